"""Alembic's environment: where the database is, and in how many transactions to migrate."""

import os

from alembic import context
from models import Base
from sqlalchemy import create_engine, pool

arguments = context.get_x_argument(as_dictionary=True)


def of_the_application(name, type_, parent_names):
    """The proxy's own schema is not the application's."""
    return type_ != "schema" or name != "pgtandem"


OPTIONS = {
    "target_metadata": Base.metadata,
    "transaction_per_migration": arguments.get("transaction") == "each",
    "include_schemas": arguments.get("schemas") == "all",
    "include_name": of_the_application,
    "compare_server_default": True,
}

if context.is_offline_mode():
    context.configure(url="postgresql+psycopg://", literal_binds=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(os.environ["SHOP_URL"], poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()
