-- The last file: all functions and views are there, and get the rights that functions/99_rights.sql describes.
revoke all on all functions in schema notifyq from public;
-- Which version is installed, for clients and runtimes of any role.
grant select on notifyq.installed to public;
do $$
begin
    perform notifyq.apply_rights();
end
$$;
