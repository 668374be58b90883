"""Another server in OpenAI's shapes, which is asked what ours is asked, with all passages in the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from ..errors import FinchError, InputError

_PATIENCE = 30  # seconds in which a server must say which models it has
_LISTED = 5  # names of models in a message


@dataclass(frozen=True, slots=True)
class Other:
    """A running server.

    Attributes:
        url: What its endpoints' addresses begin with, such as http://127.0.0.1:8000/v1.
        model: What it calls the model.
    """

    url: str
    model: str


def other_server(url: str, model: str | None) -> Other:
    """Looks whether a server is there, and what its model is called.

    Args:
        url: What its endpoints' addresses begin with.
        model: The model's name; None for the only one that it has.

    Raises:
        InputError: If this is no address, or no model is named and the server has not just one.
        FinchError: If nobody answers there.
    """
    url = url.rstrip("/")
    try:
        response = httpx.get(f"{url}/models", timeout=_PATIENCE)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise InputError(f"--against is {url!r}: use an address such as http://127.0.0.1:8000/v1") from None
    except httpx.HTTPError as error:
        raise FinchError(f"no server answers at {url} ({error}): start it first") from None
    if model is None:
        if response.status_code != 200:
            raise InputError(
                f"{url}/models answers with status {response.status_code}: name a model by --against-model"
            )
        names = _names(response)
        if len(names) != 1:
            listed = f" ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})" if names else ""
            raise InputError(f"{url}/models names {len(names)} models{listed}: name one by --against-model")
        model = names[0]
    return Other(url, model)


def _names(response: httpx.Response) -> list[str]:
    """The models that a server lists; none where it answers anything else."""
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []
