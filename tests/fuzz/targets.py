"""The fuzz targets."""

from __future__ import annotations

from .support import Target

TARGETS = {
    target.name: target
    for target in (
        Target("flat_prompts", ("finch_rag.prompts",)),
        Target("chat_templates", ("finch_rag.prompts.chat_template", "jinja2.parser", "jinja2.lexer")),
        Target("json_lines", ("finch_rag.jsonl", "json.decoder", "json.scanner")),
        Target("corpus_files", ("finch_rag.corpus", "finch_rag.jsonl", "finch_rag.prompts.sentences")),
        Target("gguf_files", ("finch_rag.models.loading", "gguf.gguf_reader"), size=8192),
        Target(
            "saved_caches",
            ("finch_rag.models.cache", "finch_rag.models.cached_document", "finch_rag.models.saved_cache"),
            size=16384,
        ),
        Target("store_folders", ("finch_rag.store",), size=1024),
        Target("json_schemas", ("finch_rag.decode.constraint", "finch_rag.settings", "finch_rag.checks")),
        Target("server_bodies", ("finch_rag.serve", "finch_rag.settings", "finch_rag.checks")),
        Target("tokens", ("finch_rag.decode.detokenising", "finch_rag.prompts.encoding")),
    )
}
