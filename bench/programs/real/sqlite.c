/* SQLite in memory: inserts, an index, a join, an aggregate and updates. */
#include "bench.h"
#include <sqlite3.h>
#include <stdio.h>

static sqlite3 *database;

static void run(const char *sql) {
    if (sqlite3_exec(database, sql, NULL, NULL, NULL) != SQLITE_OK) give_up(sqlite3_errmsg(database));
}

static uint64_t ask(const char *sql) {
    sqlite3_stmt *query;
    uint64_t sum = 0;
    if (sqlite3_prepare_v2(database, sql, -1, &query, NULL)) give_up(sqlite3_errmsg(database));
    while (sqlite3_step(query) == SQLITE_ROW)
        for (int i = 0; i < sqlite3_column_count(query); i++)
            sum = fold_word(sum, (uint64_t)sqlite3_column_int64(query, i));
    sqlite3_finalize(query);
    return sum;
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0, state = 55;
    while (size--) {
        sqlite3_stmt *insert;
        if (sqlite3_open(":memory:", &database) != SQLITE_OK) give_up("sqlite: open");
        run("create table person(id integer primary key, name text, city integer);"
            "create table visit(person integer, day integer, cost integer); begin");
        if (sqlite3_prepare_v2(database, "insert into visit values(?1 % 500, ?2 % 365, ?2 % 977)",
                               -1, &insert, NULL))
            give_up(sqlite3_errmsg(database));
        for (int i = 0; i < 6000; i++) {
            sqlite3_bind_int64(insert, 1, (int64_t)(next_random(&state) >> 8));
            sqlite3_bind_int64(insert, 2, (int64_t)(next_random(&state) >> 8));
            sqlite3_step(insert);
            sqlite3_reset(insert);
        }
        sqlite3_finalize(insert);
        run("with recursive n(i) as (select 0 union all select i + 1 from n where i < 499)"
            "insert into person select i, 'name ' || (i * 7919 % 500), i % 37 from n; commit;"
            "create index visit_person on visit(person, day)");
        sum = fold_word(sum, ask("select city, count(*), sum(cost) from person join visit"
                                 " on visit.person = person.id group by city order by 3 desc"));
        sum = fold_word(sum, ask("select length(name), max(day) from person, visit where"
                                 " person.id = visit.person and name like '%33%' group by name"));
        run("update visit set cost = cost * 2 where day between 100 and 200;"
            "delete from visit where person in (select id from person where city = 5)");
        sum = fold_word(sum, ask("select count(*), sum(cost), avg(day) * 1000 from visit"));
        sqlite3_close(database);
    }
    return sum;
}
