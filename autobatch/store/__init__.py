"""The measurement store: what the cache of the library and the service keep their measurements in."""

from autobatch.store.database import Database, StoreUnavailableError, describe_database_error, new_id, open_sqlite
from autobatch.store.measurements import (
    Measurement,
    MeasurementStore,
    NewMeasurement,
    OomReport,
    Origin,
    iso_time,
)
from autobatch.store.schema import STORE_SCHEMA, Schema, migrations, upgrade
from autobatch.store.tables import NAMING, generation, measurement, metadata, oom_report

__all__ = [
    "NAMING",
    "STORE_SCHEMA",
    "Database",
    "Measurement",
    "MeasurementStore",
    "NewMeasurement",
    "OomReport",
    "Origin",
    "Schema",
    "StoreUnavailableError",
    "describe_database_error",
    "generation",
    "iso_time",
    "measurement",
    "metadata",
    "migrations",
    "new_id",
    "oom_report",
    "open_sqlite",
    "upgrade",
]
