# Debian's Perl: hashes, regular expressions, sorting with a comparison of one's own, closures.
$| = 1;
print "S\n";
my ($size, $seed, $sum) = (shift, 1, 0);
my (%count, %after);
sub draw { $seed = ($seed * 16807) % 2147483647; $seed % $_[0] }
my @syllables = map { chr(97 + $_ % 26) . chr(97 + $_ * 7 % 26) } 0 .. 60;
for my $round (1 .. $size) {
    my $line = join ' ', map { join '', map { $syllables[draw(61)] } 1 .. 1 + draw(3) } 1 .. 30;
    my $last = '';
    for my $word (split / /, $line) {
        $count{$word}++;
        push @{$after{$last}}, $word if length $last;
        $last = $word;
    }
    $line =~ s/\b(\w)(\w*?)([aeiou])/\U$1\E$3$2/g;
    $sum += length($1) while $line =~ /([b-d]\w+?[hjk])/g;
    $sum += ($line =~ tr/a-e//);
}
my @order = sort { $count{$b} <=> $count{$a} or $a cmp $b } keys %count;
my $weigh = do { my $total = 0; sub { $total = ($total * 31 + $_[0]) % 1000003 } };
$weigh->($count{$_} + length) for @order;
$sum = $weigh->($sum + scalar @{$after{$_} || []}) for sort keys %after;
printf "E %08x\n", $sum;
