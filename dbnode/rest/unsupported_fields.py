"""Fields that clients of OpenAI and vLLM know and that do nothing here. Each is refused by name, with what helps instead.

A value that asks for nothing, or null, is taken: clients send defaults.
"""

from __future__ import annotations

from dbnode.rest.fields import Field, Unsupported

_FORM = "Use response_format or structured_outputs."
_TOOLS = "Use tools and tool_choice."
_VARIABLES = "What the model's chat template takes can be set in chat_template_kwargs."
_BIAS = "Use logit_bias."
_IDS = "POST /tokenize tells the tokens of a text."

_OPENAI: dict[str, Field] = {
    "best_of": Unsupported((1,), "Ask for n answers and choose."),
    "functions": Unsupported(([],), _TOOLS),
    "function_call": Unsupported(("none",), _TOOLS),
    "suffix": Unsupported(("",), "Write what comes after into the prompt, in the words of the model."),
    "store": Unsupported((False,), "Conversations are kept at /v1/conversations."),
    "metadata": Unsupported(({},), "Conversations have metadata."),
    "service_tier": Unsupported(("auto", "default"), "Use priority or slo_class."),
    "modalities": Unsupported((["text"],)),
    "audio": Unsupported(()),
    "prediction": Unsupported(()),
    "reasoning_effort": Unsupported((), _VARIABLES),
    "verbosity": Unsupported(("medium",)),
    "web_search_options": Unsupported(()),
    "prompt_cache_key": Unsupported((), "Beginnings are shared by content; cache_salt keeps them apart."),
    "prompt_cache_retention": Unsupported((), "POST /v1/stratakv/pin keeps a prompt."),
}
_VLLM: dict[str, Field] = {
    "use_beam_search": Unsupported((False,), "Ask for n answers and choose."),
    "length_penalty": Unsupported((1.0,)),
    "prompt_logprobs": Unsupported(()),
    "allowed_token_ids": Unsupported(([],), "Use structured_outputs or logit_bias."),
    "logprob_token_ids": Unsupported(([],), "Use logprobs or top_logprobs."),
    "bad_words": Unsupported(([],), _BIAS),
    "spaces_between_special_tokens": Unsupported((True,)),
    "truncation_side": Unsupported(("left",), "The last tokens are kept."),
    "return_token_ids": Unsupported((False,), _IDS),
    "return_tokens_as_token_ids": Unsupported((False,), _IDS),
    "request_id": Unsupported((), "Send the header X-Request-Id."),
    "kv_transfer_params": Unsupported(()),
    "prompt_embeds": Unsupported(()),
    "guided_json": Unsupported((), _FORM),
    "guided_regex": Unsupported((), _FORM),
    "guided_choice": Unsupported((), _FORM),
    "guided_grammar": Unsupported((), _FORM),
}
UNSUPPORTED: dict[str, Field] = {**_OPENAI, **_VLLM}
"""Of both completion endpoints."""
UNSUPPORTED_CHAT: dict[str, Field] = {
    "echo": Unsupported((False,), "Only /v1/completions repeats a prompt."),
    "add_special_tokens": Unsupported((False,), "The chat template writes what belongs there."),
    "chat_template": Unsupported((), _VARIABLES),
    "documents": Unsupported(([],), "Write them into the messages."),
    "include_reasoning": Unsupported((True,)),
    "mm_processor_kwargs": Unsupported(({},)),
}
UNSUPPORTED_COMPLETION: dict[str, Field] = {
    "add_special_tokens": Unsupported((True,), "Send the prompt as token ids."),
}
