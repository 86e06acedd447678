# Debian's sqlite3: joins, aggregates, window functions, a recursive query, text search by LIKE.
size=$1
echo S
result=$({ echo ".param set :size $size"; cat bench/sql.sql; } | usr/bin/sqlite3 -batch :memory:) || exit 1
echo "E $(echo "$result" | md5sum | cut -c 1-8)"
