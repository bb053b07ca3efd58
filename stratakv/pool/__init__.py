"""The memory pool as other processes use it: meta client, transports to the daemons, pages."""
