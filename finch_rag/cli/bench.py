"""``finch-rag bench``. Importable without the extra ``bench``; running one of its commands needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.arguments import names_in, numbers_in, shard_of
from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive
from . import ruler
from .arguments import (
    ChunkSizeOption,
    FollowLinksOption,
    MaxCorpusMibOption,
    MaxFileMibOption,
    ModelOption,
    RoundsOption,
    StrategyName,
    corpus_options,
)
from .bench_options import (
    BudgetsOption,
    DataArgument,
    LimitOption,
    MaxNewTokensOption,
    MethodsOption,
    OutOption,
    PlotOption,
    RetrieverChoice,
    RetrieverOption,
    SeedOption,
    ShapeOption,
    ShardOption,
    extra,
    results_folder,
    retriever_name,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure Finch on this machine.")


@app.command("speed")
def bench_speed(
    model: ModelOption = EMBEDDED,
    tokens: Annotated[str, typer.Option(metavar="N,N,...", help="Context lengths in tokens.")] = "8192,32768",
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of passages kept.")] = 512,
    chunk_size: ChunkSizeOption = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Runs of each; the median counts.")] = 3,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Of: full (one plain forward pass), finch, finch-compiled (norms and MLPs fused), finch-loop (chunk "
            "by chunk under the question), finch-store (the passages are known to a store), finch-store-best (the same "
            "without the loop), kvpress (needs the environment of make bench-peers).",
        ),
    ] = "full,finch",
    shape: ShapeOption = None,
    plot: PlotOption = None,
) -> None:
    """Time prefill and decoding, and measure memory, of the plain model and of Finch.

    Each method at each length runs in a process of its own; what window or memory is too small for is skipped.

    Prints a table and ratios; the last line is one JSON object.
    """
    check_positive(budget=budget, chunk_size=chunk_size, repeats=repeats)
    lengths = numbers_in("tokens", tokens)
    with extra():
        from ..bench import speed
    speed.main(
        model=model,
        tokens=lengths,
        budget=budget,
        chunk_size=chunk_size,
        repeats=repeats,
        methods=names_in(methods),
        shape=shape,
        plot=plot,
    )


@app.command("many")
def bench_many(
    model: ModelOption = EMBEDDED,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the passages.")] = 32768,
    questions: Annotated[int, typer.Option(metavar="N", help="Questions over the same passages.")] = 8,
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of passages kept for each.")] = 512,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer.")] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Runs of each way; the median counts.")] = 3,
    shape: ShapeOption = None,
) -> None:
    """Time several questions over one list of passages, one after another and by ask_many.

    Prints a table; the last line is one JSON object.
    """
    check_positive(tokens=tokens, questions=questions, budget=budget, new_tokens=new_tokens, repeats=repeats)
    with extra():
        from ..bench import many
    many.main(
        model=model,
        tokens=tokens,
        questions=questions,
        budget=budget,
        new_tokens=new_tokens,
        repeats=repeats,
        shape=shape,
    )


@app.command("load")
def bench_load(
    model: ModelOption = EMBEDDED,
    clients: Annotated[str, typer.Option(metavar="N,N,...", help="Clients that ask at once.")] = "1,4,16",
    requests: Annotated[
        int, typer.Option(metavar="N", help="Questions; as many as there are clients at the least.")
    ] = 32,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of the passages that a request brings along.")
    ] = 2048,
    store_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a store that all ask instead; 0 for none.")
    ] = 0,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="The most tokens of an answer.")] = 64,
    budget: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Tokens of passages kept.", show_default=False)
    ] = None,
    rounds: RoundsOption = None,
    running: Annotated[int, typer.Option(metavar="N", help="The most answers that the server makes at once.")] = 16,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Another running server in OpenAI's shapes, such as http://127.0.0.1:8000/v1: it is then asked the "
            "same questions, with all passages in the prompt.",
            show_default=False,
        ),
    ] = None,
    against_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What that server calls the model.  [dim]\\[default: the only one that it has][/]",
            show_default=False,
        ),
    ] = None,
    compile_layers: Annotated[bool, typer.Option("--compile-layers", help="Fuse norms and MLPs, for a GPU.")] = False,
    shape: ShapeOption = None,
) -> None:
    """Put load on a server of this model: requests a second, seconds to the first token and to the end.

    The server runs here, the clients in a process of their own, over loopback; the extra serve is needed. All numbers
    of clients ask the same questions, and their answers are compared with those of the first number. With --against
    another server is measured after this one.

    Prints tables; the last line is one JSON object.
    """
    with extra():
        from ..bench import load
    load.main(
        model=model,
        shape=shape,
        clients=numbers_in("clients", clients),
        requests=requests,
        tokens=tokens,
        store_tokens=store_tokens,
        new_tokens=new_tokens,
        budget=budget,
        rounds=rounds,
        running=running,
        compile_layers=compile_layers,
        against=against,
        against_model=against_model,
    )


@app.command("soak")
def bench_soak(
    model: ModelOption = EMBEDDED,
    minutes: Annotated[
        float, typer.Option(metavar="N", help="Of the soak; half as many, 5 at the most, go before as a warm-up.")
    ] = 30.0,
    clients: Annotated[int, typer.Option(metavar="N", help="Clients that ask at once.")] = 8,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what they send.")] = 0,
    running: Annotated[int, typer.Option(metavar="N", help="The most answers that the server makes at once.")] = 4,
) -> None:
    """Soak a server of this model in random requests, one in ten hostile, and check every answer.

    The server runs here, the clients in a process of their own, over loopback; the extra serve is needed. An answer
    must be that of the same request alone, a refusal a 4xx. At the end nothing may run, no cache be left, no memory be
    lost.

    Prints a table; the last line is one JSON object. It fails if anything was wrong.
    """
    check_positive(clients=clients, running=running)
    with extra():
        from ..bench import soak
    soak.main(model=model, minutes=minutes, clients=clients, seed=seed, running=running)


@app.command(
    "quality",
    epilog="[bold]Examples[/]\n\nfinch-rag bench quality nq_open/ --top-k 30 --budget 256,512\n\n"
    "finch-rag bench quality nq_open/ --model Qwen/Qwen2.5-1.5B-Instruct --limit 400 --methods finch,full,top-k,gold "
    "--plot quality.png",
)
def bench_quality(
    data: DataArgument,
    out: OutOption = None,
    model: ModelOption = EMBEDDED,
    retriever: RetrieverOption = RetrieverChoice.BM25,
    top_k: Annotated[int, typer.Option(metavar="N", help="Passages a question; all if there are fewer.")] = 100,
    order: Annotated[
        str,
        typer.Option(
            metavar="ORDER",
            help="rank (best first), random, or gold-at:I: the answer's passage at place I, from 0, among the best "
            "ranked others.",
        ),
    ] = "rank",
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    budget: BudgetsOption = "512",
    methods: MethodsOption = "finch,full,top-k",
    max_new_tokens: MaxNewTokensOption = 16,
    instructions: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What stands before the passages.  [dim]\\[default: asks for a few words, or for two or three "
            "sentences where the known answers are long][/]",
            show_default=False,
        ),
    ] = None,
    unanswerable: Annotated[
        bool,
        typer.Option(
            "--unanswerable",
            help="Ask each question a second time without its gold passages: who notices that nothing answers it?",
        ),
    ] = False,
    shard: ShardOption = "1/1",
    plot: PlotOption = None,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
) -> None:
    """Ask questions with known answers by several methods: accuracy, F1, seconds and memory.

    Long answers are graded by ROUGE-L as well, and by their quotes where the data marks the sentences that count.
    Questions without an answer are graded by how well the method's support tells them from the others (AUROC).

    Each answer is stored in --out as soon as it is there (results*.jsonl).
    The same command goes on where it was cut off; with more --methods or --budget it adds what is missing.
    Other settings need another folder.

    Prints a table with 95% intervals and paired differences; the last line is one JSON object.
    """
    budgets, part = numbers_in("budget", budget), shard_of(shard)
    corpus = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    with extra():
        from ..bench import quality
    kinds = ["unanswerable"] if unanswerable else []
    name = "-".join([quality.data_name(data), retriever, str(top_k), order.replace(":", "-"), *kinds])
    quality.main(
        data,
        out or results_folder(name, model, limit, seed),
        model=model,
        retriever=retriever_name(retriever),
        top_k=top_k,
        order=order,
        limit=limit,
        seed=seed,
        budgets=budgets,
        methods=names_in(methods),
        max_new_tokens=max_new_tokens,
        instructions=instructions,
        unanswerable=unanswerable,
        shard=part,
        plot=plot,
        **corpus,
    )


@app.command(
    "positions", epilog="[bold]Example[/]\n\nfinch-rag bench positions nq_open/ --passages 20 --plot places.png"
)
def bench_positions(
    data: DataArgument,
    out: OutOption = None,
    passages: Annotated[str, typer.Option(metavar="N,...", help="Passages a question.")] = "20,50",
    model: ModelOption = EMBEDDED,
    retriever: RetrieverOption = RetrieverChoice.BM25,
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of passages in the cache.")] = 512,
    methods: MethodsOption = "finch,full",
    max_new_tokens: MaxNewTokensOption = 16,
    shard: ShardOption = "1/1",
    plot: PlotOption = None,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
) -> None:
    """Move the answer's passage from the first place to the last: who gets lost in the middle?

    It stands at 0, 25, 50, 75 and 100% of --passages, with the same questions at each place.
    The other passages are the best ranked that do not hold the answer.
    Each answer is stored in --out as soon as it is there; the same command goes on where it was cut off.

    Prints a table for each number of passages; the last line is one JSON object.
    """
    counts, part = numbers_in("passages", passages), shard_of(shard)
    corpus = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    with extra():
        from ..bench import positions, quality
    name = f"{quality.data_name(data)}-{retriever}-positions"
    positions.main(
        data,
        out or results_folder(name, model, limit, seed),
        passages=counts,
        model=model,
        retriever=retriever_name(retriever),
        limit=limit,
        seed=seed,
        budget=budget,
        methods=names_in(methods),
        max_new_tokens=max_new_tokens,
        shard=part,
        plot=plot,
        **corpus,
    )


@app.command("recall", epilog="[bold]Example[/]\n\nfinch-rag bench recall nq_open/ --rankers bm25,store,fused")
def bench_recall(
    data: DataArgument,
    model: ModelOption = EMBEDDED,
    rankers: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Of: bm25, dense (MiniLM embeddings), store (a store that has read all passages), store-int8, fused "
            "(the store and BM25), loop (the loop over BM25's best 100), independent (each of them is read alone).",
        ),
    ] = "bm25,dense,store,fused",
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
) -> None:
    """How often the passages that answer are among the first 1, 2, 4, 8 and 20 of a ranking of all passages.

    Prints a table; the last line is one JSON object.
    """
    corpus = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    with extra():
        from ..bench import recall
    recall.main(data, model=model, rankers=names_in(rankers), limit=limit, seed=seed, **corpus)


@app.command("kept")
def bench_kept(
    data: DataArgument,
    attention: Annotated[
        Path,
        typer.Option(
            "--attention",
            metavar="FILE",
            help="Where the measured attention is kept (.jsonl.gz); where it is there already, no model is loaded.",
            show_default=False,
        ),
    ],
    model: ModelOption = EMBEDDED,
    retriever: RetrieverOption = RetrieverChoice.BM25,
    strategy: Annotated[
        StrategyName, typer.Option(help="Read each passage alone (independent), or all in turn (loop).")
    ] = StrategyName.INDEPENDENT,
    order: Annotated[str, typer.Option(metavar="ORDER", help="rank (best first) or random.")] = "rank",
    top_k: Annotated[int, typer.Option(metavar="N", help="Passages a question; all if there are fewer.")] = 100,
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    budget: Annotated[str, typer.Option(metavar="TOKENS,...", help="Tokens that a rule keeps.")] = "512,1024,2048",
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
) -> None:
    """How often all passages that a question needs are among those that it is answered from, by cutoff and prior.

    Prints a table; the last line is one JSON object.
    """
    corpus = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    with extra():
        from ..bench import kept
    kept.main(
        data,
        file=attention,
        model=model,
        retriever=retriever_name(retriever),
        strategy=strategy.literal,
        order=order,
        top_k=top_k,
        limit=limit,
        seed=seed,
        budgets=numbers_in("budget", budget),
        **corpus,
    )


app.command("ruler", epilog=ruler.EPILOG)(ruler.bench_ruler)
