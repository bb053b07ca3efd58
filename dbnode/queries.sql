-- name: insert_usage_events
-- One row per ended request, by columns as arrays; a request id that is there already is left alone.
INSERT INTO stratakv.usage_events (
    request_id, tenant_id, model, source, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
    cached_disk_tokens, generated_tokens, outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms
)
SELECT
    event.request_id, tenant.id, event.model, event.source, event.prompt_tokens, event.l1, event.l2, event.pool,
    event.disk, event.generated_tokens, event.outcome, event.queue_ms, event.ttft_ms, event.generation_ms, event.mean_itl_ms
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::integer[], $7::integer[], $8::integer[],
    $9::integer[], $10::integer[], $11::text[], $12::double precision[], $13::double precision[],
    $14::double precision[], $15::double precision[]
) AS event (
    request_id, tenant, model, source, prompt_tokens, l1, l2, pool, disk, generated_tokens, outcome, queue_ms, ttft_ms,
    generation_ms, mean_itl_ms
)
JOIN stratakv.tenants AS tenant ON tenant.name = event.tenant
ON CONFLICT (request_id) DO NOTHING
