"""Several statements at once, with temporary and short-lived tables, a sequence, a renamed label."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade():
    op.execute("SET LOCAL lock_timeout = '30s'; SET LOCAL statement_timeout = '60s'")
    op.execute(
        "CREATE TEMP TABLE moved ON COMMIT DROP AS SELECT id, upper(display_name) AS name FROM people WHERE id % 3 = 0;"
        " UPDATE people SET display_name = moved.name FROM moved WHERE moved.id = people.id;"
        " DROP TABLE moved"
    )
    op.execute(
        "CREATE TABLE staging (LIKE orders INCLUDING ALL); INSERT INTO staging SELECT id, person_id, state, total, remark"
        " FROM orders; DELETE FROM staging WHERE state = 'new'; DROP TABLE staging"
    )
    op.execute("ALTER TYPE order_state RENAME VALUE 'shipped' TO 'sent'; UPDATE orders SET state = 'sent' WHERE id % 11 = 0")
    op.execute("ALTER TYPE order_state RENAME VALUE 'sent' TO 'shipped'")
    op.execute(
        "CREATE SEQUENCE tickets START 100;"
        " INSERT INTO audit_log (what) SELECT 'ticket ' || nextval('tickets') FROM generate_series(1, 5);"
        " CREATE FUNCTION count_up() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.version := OLD.version + 1; RETURN NEW; END $$;"
        " CREATE TRIGGER count_up BEFORE UPDATE ON settings FOR EACH ROW EXECUTE FUNCTION count_up();"
        " UPDATE settings SET value = value || '{\"seen\": true}' WHERE jsonb_typeof(value) = 'object'"
    )


def downgrade():
    op.execute("DROP TRIGGER count_up ON settings; DROP FUNCTION count_up(); DROP SEQUENCE tickets")
