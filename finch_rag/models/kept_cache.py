"""What every cache that Finch answers from remembers: the prefix, what is kept of the passages, and where from."""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers import Cache

from .cached_document import CachedDocument


class KeptCache(Cache):
    """A transformers cache that holds a prefix and the kept tokens of a document.

    Attributes:
        prefix: Tokens at the start that are never evicted.
        kept: Document positions of the kept tokens in the cache's order: shape [layers, kept] where each layer chose
            its own, [1, kept] where all keep the same.
        document: The passages that were read, for citations.
        unread: Token ids that belong behind those in use, shape [tokens]: the next pass takes them along, because a
            pass of its own costs an accelerator's host as much as a long one. None where there are none.
        whole: Whether it has the keys and values of all heads. In a process that shares the model with others it has
            those of some, and is of use with them alone.
    """

    prefix: int = 0
    kept: torch.Tensor
    document: CachedDocument
    unread: torch.Tensor | None = None
    whole: bool = True

    def _keep_nothing(self) -> None:
        self.prefix = 0
        self.kept = torch.empty(1, 0, dtype=torch.long)
        self.document = CachedDocument()
        self.unread = None

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in use."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes over all layers."""

    @abstractmethod
    def fork(self, room: int) -> KeptCache:
        """A copy to decode on, so that this cache can be asked again.

        Args:
            room: Tokens that will be appended to the copy.
        """

    def zero_or_nan(self, device: torch.device) -> torch.Tensor:
        """0, or NaN where a key or value is NaN or infinite: added to logits, it is told with the next token.

        Attention gives no weight to a key whose product is minus infinity, so the logits need not show it. Models' own
        caches are not looked at: they hold states of many kinds.

        Args:
            device: Where to put it.

        Returns:
            Float32, shape [].
        """
        return torch.zeros((), device=device)

    @property
    def kept_tokens(self) -> int:
        """Document tokens kept in every layer."""
        return self.kept.shape[1]

    @property
    def unread_tokens(self) -> int:
        """Tokens that the next pass must take along."""
        return 0 if self.unread is None else len(self.unread)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in use."""
        return self.bytes_per_token * self.length

    def take_unread(self) -> list[int]:
        """The token ids that the next pass must take along; it is the caller's now to run them."""
        taken = [] if self.unread is None else self.unread.tolist()
        self.unread = None
        return taken

    def _take_record(self, other: KeptCache) -> None:
        self.prefix, self.kept, self.document, self.unread = other.prefix, other.kept, other.document, other.unread
        self.whole = other.whole
