"""The three architectures in numpy, float32, written from the papers: slow, clear, independent of llama.cpp.

    qwen.py          https://arxiv.org/abs/2309.16609
    chatglm3.py      https://arxiv.org/abs/2406.12793, https://arxiv.org/abs/2103.10360
    deepseek_llm.py  https://arxiv.org/abs/2401.02954 (the Llama architecture, https://arxiv.org/abs/2302.13971)

Each has logits(weights, shape, ids) -> (n_ids, n_vocab) over weights by their official names.
"""
