# %% [markdown]
# # A LangChain retrieval chain that reads everything
#
# A vector store over the example corpus (108 passages, about 18,000 tokens), asked with three documents, as one does
# with a small model, and then with *all* of them through `ChatFinch`: one call, answered from a cache of a few hundred
# tokens, with citations. The model is SmolLM2-135M-Instruct, whose window has 8,192 tokens; everything runs on two CPU
# cores.

# %%
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_finch import ChatFinch, FinchReranker, create_finch_documents_chain
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from finch_rag.corpus import read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import embedding_model_folder
from finch_rag.models.embedded import embedded_folder

QUESTION = "Who is the captain of the ferry that is licensed for 38 passengers?"

# %% [markdown]
# ## The store
#
# Each passage becomes a document with an id, a title and a source. Any vector store will do; any embeddings, too: these
# are all-MiniLM-L6-v2, from a package.


# %%
class MiniLM(Embeddings):
    def __init__(self) -> None:
        self.model = SentenceTransformer(str(embedding_model_folder()), local_files_only=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


documents = [
    Document(passage.text, id=passage.id, metadata={"title": passage.title, "source": passage.id.split("#")[0]})
    for passage in read_corpus(example_corpus()).passages
]
store = InMemoryVectorStore.from_documents(documents, MiniLM())
print(f"{len(documents)} documents")

# %% [markdown]
# ## Three documents
#
# The retriever knows ferries from lighthouses, but not which ferry is meant: the passage is not among its best three.

# %%
chat = ChatFinch(model="embedded", max_tokens=32)  # or a hub id, a folder, a GGUF file
chain = create_retrieval_chain(store.as_retriever(search_kwargs={"k": 3}), create_finch_documents_chain(chat))
result = chain.invoke({"input": QUESTION})
print(result["answer"])
for document in result["context"]:
    print(f"  {document.id}")

# %% [markdown]
# ## All of them
#
# The same chain with every document, and with citations. They carry the documents' ids, titles and sources, because
# the documents chain hands the documents over apart.

# %%
chain = create_retrieval_chain(
    store.as_retriever(search_kwargs={"k": len(documents)}), create_finch_documents_chain(chat, with_citations=True)
)
answer = chain.invoke({"input": QUESTION})["answer"]
print(answer["text"])
for citation in answer["citations"]:
    print(f"  {citation['passage_id']}: {citation['kept_tokens']} of {citation['passage_tokens']} tokens")
report = answer["report"]
print(
    f"read {report['context_tokens']} tokens, kept {report['kept_tokens']}, "
    f"{report['compression_factor']:.0f} times fewer, {report['kv_bytes_kept'] / 2**20:.1f} MiB in place of "
    f"{report['kv_bytes_full'] / 2**20:.0f}"
)

# %% [markdown]
# ## An expression, and streaming
#
# `ChatFinch` is a chat model like others: documents come with `bind(documents=...)`, or inside one of LangChain's own
# prompts, where they are found again. Here a prompt of `RetrievalQA`, in the expression language.

# %%
prompt = ChatPromptTemplate.from_messages(
    [
        ("system", "Use the following pieces of context to answer the user's question. \n----------------\n{context}"),
        ("human", "{question}"),
    ]
)
retriever = store.as_retriever(search_kwargs={"k": 12})
joined = retriever | (lambda found: "\n\n".join(document.page_content for document in found))
for chunk in ({"context": joined, "question": RunnablePassthrough()} | prompt | chat).stream(QUESTION):
    print(chunk.content, end="|")
print(f"\n{chunk.response_metadata['parse_mode']}, {chunk.usage_metadata}")

# %% [markdown]
# ## Attention as a reranker, in front of another model
#
# `FinchReranker` puts documents in the order of the attention that the question pays to them. The model behind it may
# be any; here it is the same one, run plainly by transformers, with the best document in its prompt.

# %%
generate = pipeline("text-generation", model=str(embedded_folder()), device="cpu", dtype="float32")


def plain_model(prompt: PromptValue) -> str:
    messages = [{"role": "user", "content": message.text} for message in prompt.to_messages()]
    output = generate(messages, max_new_tokens=32, max_length=None, do_sample=False)
    return output[0]["generated_text"][-1]["content"]


stuff = create_stuff_documents_chain(
    plain_model,
    ChatPromptTemplate.from_template(
        "Answer the question based only on the following context:\n{context}\n\nQuestion: {input}"
    ),
)
reranked = ContextualCompressionRetriever(
    base_compressor=FinchReranker(llm=chat, top_n=1), base_retriever=store.as_retriever(search_kwargs={"k": 12})
)
result = create_retrieval_chain(reranked, stuff).invoke({"input": QUESTION})
print(result["answer"])
for document in result["context"]:
    print(f"  {document.metadata['relevance_score']:.2f}  {document.id}")
