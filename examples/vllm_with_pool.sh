#!/bin/sh
# A vLLM server whose prefix cache goes on in the pool of a running `stratakv up`. Start it twice, with different ports: what
# one has computed, the other one loads. Needs vLLM and StrataKV in one environment (docs/how-to/use-with-vllm.md).
#
#   [META=tcp://HOST:6383] examples/vllm_with_pool.sh MODEL PORT [FLAGS OF vllm serve]
set -eu
[ $# -ge 2 ] || { echo "usage: $0 MODEL PORT [FLAGS OF vllm serve]" >&2; exit 2; }
model=$1 port=$2
shift 2

exec vllm serve "$model" --port "$port" --prefix-caching-hash-algo sha256_cbor --kv-transfer-config '{
  "kv_connector": "StrataKVConnector",
  "kv_connector_module_path": "stratakv.integrations.vllm",
  "kv_role": "kv_both",
  "kv_load_failure_policy": "recompute",
  "kv_connector_extra_config": {"meta": "'"${META:-tcp://127.0.0.1:6383}"'"}}' "$@"
