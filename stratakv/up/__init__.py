"""`stratakv up`: the whole system on one machine, under one supervisor."""
