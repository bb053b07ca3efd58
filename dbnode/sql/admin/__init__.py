"""The admin database: a database that exists only in the DB node, where SHOW tells what the node is doing."""
