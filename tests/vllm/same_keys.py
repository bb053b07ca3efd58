"""Run by vLLM's Python: are the keys that the connector computes those that vLLM would, whatever enters them?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import vllm.v1.core.kv_cache_utils as hashes
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256_cbor
from vllm.v1.request import Request

from stratakv.integrations.vllm.keys import RequestKeys
from stratakv.keys import NONE_HASH

TOKENS = list(range(1000, 1150))


def requests(block_size: int) -> Iterator[Request]:
    """With everything that enters keys, alone and together."""
    hasher = hashes.get_request_block_hasher(block_size, sha256_cbor)
    image = MultiModalFeatureSpec(data=None, modality="image", identifier="i1", mm_position=PlaceholderRange(20, 40))
    later = MultiModalFeatureSpec(data=None, modality="image", identifier="i2", mm_position=PlaceholderRange(62, 5))
    lora = LoRARequest("adapter", 1, "/adapters/1")
    for number, more in enumerate(
        (
            {},
            {"cache_salt": "s"},
            {"lora_request": lora},
            {"mm_features": [image, later]},
            {"cache_salt": "s", "lora_request": lora, "mm_features": [image, later]},
        )
    ):
        arguments: dict[str, Any] = {"request_id": f"{block_size}-{number}", "prompt_token_ids": TOKENS, **more}
        yield Request(sampling_params=SamplingParams(), pooling_params=None, block_hasher=hasher, **arguments)


def main() -> None:
    hashes.init_none_hash(sha256_cbor)
    assert hashes.NONE_HASH == NONE_HASH
    seen = set()
    for block_size in (16, 64):
        computed = RequestKeys(block_size, block_size, "sha256")
        coarse = RequestKeys(block_size, block_size // 2, "sha256_cbor")
        taken = RequestKeys(block_size, block_size, "sha256_cbor")
        assert (computed.are_vllms, coarse.are_vllms, taken.are_vllms) == (False, False, True)
        for request in requests(block_size):
            expected = list(request.block_hashes)
            assert len(expected) == len(TOKENS) // block_size
            assert list(computed.of(request)) == list(coarse.of(request)) == list(taken.of(request)) == expected
            request.append_output_token_ids(list(range(block_size)))
            assert list(computed.of(request)) == list(request.block_hashes)
            assert len(computed.of(request)) == len(expected) + 1
            computed.forget(request.request_id)
            seen.add(expected[-1])
    assert len(seen) == 10
    print("same")


if __name__ == "__main__":
    main()
