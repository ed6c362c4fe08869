"""What the tables that describe an architecture are made of: config fields, weight rules, variants of storage."""
