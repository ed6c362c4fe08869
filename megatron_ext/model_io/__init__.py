"""Opening, writing, transferring, converting and comparing whole models, whatever format they are in."""
