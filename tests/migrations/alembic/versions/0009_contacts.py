"""people is split: what reaches a person moves to contacts."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade():
    op.create_table(
        "contacts",
        sa.Column("person_id", sa.BigInteger, sa.ForeignKey("people.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("email", sa.String(120)),
    )
    op.execute("LOCK TABLE people IN SHARE ROW EXCLUSIVE MODE")
    op.execute("INSERT INTO contacts SELECT id, email FROM people WHERE email IS NOT NULL")
    op.drop_column("people", "email")


def downgrade():
    op.add_column("people", sa.Column("email", sa.String(120)))
    op.execute("UPDATE people SET email = c.email FROM contacts c WHERE c.person_id = people.id")
    op.drop_table("contacts")
