# %% [markdown]
# # A LlamaIndex query engine that reads everything
#
# An index over the example corpus (108 passages, about 18,000 tokens), asked with a small `similarity_top_k`, as one
# does with a small model, and then with *all* passages through `FinchLLM`: one call, answered from a cache of a few
# hundred tokens, with citations. The model is SmolLM2-135M-Instruct, whose window has 8,192 tokens; everything runs on
# two CPU cores.

# %%
import faiss
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.finch import FinchLLM, FinchRerank, FinchSynthesizer
from llama_index.vector_stores.faiss import FaissVectorStore
from transformers.utils import logging

from finch_rag.corpus import read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import embedding_model_folder

logging.disable_progress_bar()  # of loading weights

QUESTION = "Who is the captain of the ferry that is licensed for 38 passengers?"

# %% [markdown]
# ## The index
#
# MiniLM embeddings in a FAISS store. Each passage becomes a node with an id and a title.

# %%
passages = read_corpus(example_corpus()).passages
nodes = [TextNode(id_=passage.id, text=passage.text, metadata={"title": passage.title}) for passage in passages]
index = VectorStoreIndex(
    nodes,
    storage_context=StorageContext.from_defaults(vector_store=FaissVectorStore(faiss.IndexFlatIP(384))),
    embed_model=HuggingFaceEmbedding(str(embedding_model_folder())),
)
print(f"{len(nodes)} nodes")

# %% [markdown]
# ## A small top-k
#
# The retriever knows ferries from lighthouses, but not which ferry is meant: the passage is not among its best three.

# %%
llm = FinchLLM("embedded", max_new_tokens=48)  # or a hub id, a folder, a GGUF file
response = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
print(response)
for source in response.source_nodes:
    print(f"  {source.score:.2f}  {source.node_id}")

# %% [markdown]
# ## Everything, drop-in
#
# The same query engine with every node: LlamaIndex packs them into one prompt, because `FinchLLM` says that it can read
# that much; `FinchLLM` takes the prompt apart again and reads the passages in chunks.

# %%
query_engine = index.as_query_engine(llm=llm, similarity_top_k=len(nodes))
print(query_engine.query(QUESTION))

# %% [markdown]
# ## Citations and the report
#
# With `FinchSynthesizer` the nodes stay apart, so the answer's citations carry their ids.

# %%
query_engine = index.as_query_engine(
    llm=llm, response_synthesizer=FinchSynthesizer(llm=llm), similarity_top_k=len(nodes)
)
response = query_engine.query(QUESTION)
print(response)
for citation in response.metadata["finch"]["citations"]:
    print(f"  {citation['passage_id']}: {citation['kept_tokens']} of {citation['passage_tokens']} tokens")
report = response.metadata["finch"]["report"]
print(
    f"read {report['context_tokens']} tokens, kept {report['kept_tokens']}, "
    f"{report['compression_factor']:.0f} times fewer, {report['kv_bytes_kept'] / 2**20:.1f} MiB in place of "
    f"{report['kv_bytes_full'] / 2**20:.0f}"
)

# %% [markdown]
# ## Streaming

# %%
query_engine = index.as_query_engine(
    llm=llm, response_synthesizer=FinchSynthesizer(llm=llm, streaming=True), similarity_top_k=30
)
for delta in query_engine.query(QUESTION).response_gen:
    print(delta, end="|")

# %% [markdown]
# ## Attention as a reranker
#
# `FinchRerank` puts the nodes in order of the attention that the question pays to them, for any LLM.

# %%
retrieved = index.as_retriever(similarity_top_k=30).retrieve(QUESTION)
rank = [node.node_id for node in retrieved].index("ferries.md#mv-tystie") + 1
print(f"the retriever has it in place {rank}; the reranker's first three:")
for node in FinchRerank(llm=llm, top_n=3).postprocess_nodes(retrieved, query_str=QUESTION):
    print(f"  {node.score:.2f}  {node.node_id}")
