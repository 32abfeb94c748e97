"""What more than one migration makes."""

SUMMARY = (
    "CREATE VIEW summary AS SELECT p.id, p.{} AS name, count(o.id) AS orders, sum(o.total) AS total"
    " FROM people p LEFT JOIN orders o ON o.person_id = p.id GROUP BY p.id"
)

KEEP_NAMES_ALIKE = """
CREATE FUNCTION keep_names_alike() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.display_name IS DISTINCT FROM OLD.display_name THEN
        NEW.full_name := NEW.display_name;
    ELSE
        NEW.full_name := coalesce(NEW.full_name, NEW.display_name);
        NEW.display_name := NEW.full_name;
    END IF;
    RETURN NEW;
END $$
"""

ON_PEOPLE = (
    "CREATE TRIGGER keep_names_alike BEFORE INSERT OR UPDATE ON people"
    " FOR EACH ROW EXECUTE FUNCTION keep_names_alike()"
)
