-- A table whose trigger sends a job for every order, in the order's own transaction.
create table if not exists orders (
    id bigint generated always as identity primary key,
    item text not null
);

create or replace function confirm_order() returns trigger
language plpgsql
as $$
begin
    perform notifyq.send('orders', jsonb_build_object('id', new.id, 'item', new.item));
    return new;
end
$$;

drop trigger if exists confirm_order on orders;
create trigger confirm_order after insert on orders
for each row execute function confirm_order();
