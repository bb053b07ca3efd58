"""Who a request is from, what they may do, and how much: the directory of tenants, their turn in the queue, their quotas."""
