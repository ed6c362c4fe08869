"""The machinery of the tables that describe an architecture: config fields, weight rules, variants of storage."""
