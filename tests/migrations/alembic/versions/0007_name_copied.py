"""people.full_name becomes display_name, first step: both, kept alike by a trigger."""

import sqlalchemy as sa
from alembic import op
from statements import KEEP_NAMES_ALIKE, ON_PEOPLE

revision = "0007"
down_revision = "0006"


def upgrade():
    op.add_column("people", sa.Column("display_name", sa.String(80)))
    op.execute(KEEP_NAMES_ALIKE)
    op.execute(ON_PEOPLE)
    op.execute("UPDATE people SET display_name = full_name")
    op.alter_column("people", "display_name", nullable=False)


def downgrade():
    op.execute("DROP TRIGGER keep_names_alike ON people")
    op.execute("DROP FUNCTION keep_names_alike()")
    op.drop_column("people", "display_name")
