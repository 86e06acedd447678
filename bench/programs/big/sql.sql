create table orders(id integer primary key, customer integer, amount integer, note text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 1000 * :size)
insert into orders
select i, (i * 7919) % 997, (i * 104729) % 10007, printf('%05d of %s', (i * 31) % 8191, hex(i * 2654435761))
from n;
create table customers as
select customer as id, 'c' || customer as name, count(*) as orders from orders group by customer;
create index by_customer on orders(customer, amount);
select count(*), sum(length(name)), sum(o.amount) from customers c join orders o on o.customer = c.id
where o.amount % 3 = c.id % 3;
select sum(place * amount % 101) from
(select amount, rank() over (partition by customer order by amount) as place from orders);
select count(*) from orders where note like '%A%F%' and note not like '0%';
select sum(total) from (select substr(note, 1, 3) as k, count(distinct customer) as total
from orders group by k having total > 3 order by total desc, k);
with recursive path(i, n, steps) as (select id, id, 0 from orders where id <= 12 * :size
union all select i, case when n % 2 then 3 * n + 1 else n / 2 end, steps + 1 from path where n > 1)
select max(steps), sum(steps) from path;
