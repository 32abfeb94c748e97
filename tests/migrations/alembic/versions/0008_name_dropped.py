"""people.full_name becomes display_name, second step: the old one goes, the view with it and back."""

import sqlalchemy as sa
from alembic import op
from statements import KEEP_NAMES_ALIKE, ON_PEOPLE, SUMMARY

revision = "0008"
down_revision = "0007"


def upgrade():
    op.execute("DROP VIEW summary")
    op.execute("DROP TRIGGER keep_names_alike ON people")
    op.execute("DROP FUNCTION keep_names_alike()")
    op.drop_column("people", "full_name")
    op.execute(SUMMARY.format("display_name"))


def downgrade():
    op.execute("DROP VIEW summary")
    op.add_column("people", sa.Column("full_name", sa.String(80)))
    op.execute("UPDATE people SET full_name = display_name")
    op.alter_column("people", "full_name", nullable=False)
    op.execute(KEEP_NAMES_ALIKE)
    op.execute(ON_PEOPLE)
    op.execute(SUMMARY.format("full_name"))
