"""Data that only the server can compute."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

from sqlalchemy.dialects.postgresql import JSONB, UUID


def upgrade():
    op.add_column(
        "people", sa.Column("token", UUID, nullable=False, server_default=sa.text("gen_random_uuid()"))
    )
    op.add_column("people", sa.Column("profile", JSONB))
    audit = op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("what", sa.Text, nullable=False),
    )
    people = sa.table("people", sa.column("id"), sa.column("display_name"), sa.column("profile", JSONB))
    op.execute(
        people.update()
        .where(people.c.id % op.inline_literal(2) == op.inline_literal(0))
        .values(profile=sa.func.jsonb_build_object("initial", sa.func.left(people.c.display_name, 1), "luck", sa.func.random()))
    )
    op.bulk_insert(audit, [{"what": f"entry {n}"} for n in range(30)])
    # A function made for this, which writes, and goes again.
    op.execute(
        "CREATE FUNCTION note_all() RETURNS bigint LANGUAGE plpgsql AS $$ DECLARE n bigint; BEGIN"
        " INSERT INTO audit_log (what) SELECT 'person ' || id || ' at ' || clock_timestamp() || random() FROM people;"
        " GET DIAGNOSTICS n = ROW_COUNT; RETURN n; END $$"
    )
    op.execute("SELECT note_all()")
    op.execute("DROP FUNCTION note_all()")


def downgrade():
    op.drop_table("audit_log")
    op.drop_column("people", "profile")
    op.drop_column("people", "token")
