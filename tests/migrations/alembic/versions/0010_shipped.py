"""A label more for an enum, which no transaction may use that added it."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade():
    with op.get_context().autocommit_block():
        op.execute("ALTER TYPE order_state ADD VALUE IF NOT EXISTS 'shipped' AFTER 'paid'")
    op.execute("UPDATE orders SET state = 'shipped' WHERE state = 'paid' AND id % 5 = 0")


def downgrade():
    """No label can be removed: another type takes the place of this one."""
    op.execute("DROP INDEX ix_orders_open")
    op.execute("ALTER TYPE order_state RENAME TO order_state_old")
    op.execute("CREATE TYPE order_state AS ENUM ('new', 'paid')")
    op.alter_column("orders", "state", server_default=None)
    op.execute(
        "ALTER TABLE orders ALTER COLUMN state TYPE order_state"
        " USING CASE state WHEN 'shipped' THEN 'paid' ELSE state::text END::order_state"
    )
    op.alter_column("orders", "state", server_default="new")
    op.execute("CREATE INDEX ix_orders_open ON orders (person_id) WHERE state = 'new'")
    op.execute("DROP TYPE order_state_old")
