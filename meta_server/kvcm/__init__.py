"""The KVCM API: what clients of Tair KVCache Manager speak, over gRPC and HTTP, on this meta server's store.

A request comes in at `grpc_face` or `http_face`, goes through `calls` to `meta_service` or `admin_service`, which work on
`state` (instances, groups, storages, locations). Every change is written by the meta server's journal before it is answered.
"""
