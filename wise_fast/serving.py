"""transformers' own OpenAI-compatible server, serving an edited model (extra `serve`).

Requests wait for each other at the model, edits among them: an answer is begun and ended with the same edits, and the
next one has those that were made meanwhile. A request says which pack answers it by the name of the model, as servers
of adapters have it: "edited" asks for the active ones, "edited:legal" for the pack "legal".
"""

from __future__ import annotations

import asyncio
import functools

from transformers.utils.import_utils import is_serve_available

from wise_fast.errors import WiseError
from wise_fast.pack_rows import known

_NEEDS = "serving needs fastapi, uvicorn, openai, pydantic and a recent transformers: pip install -U 'wise_fast[serve]'"
if not is_serve_available():
    raise WiseError(_NEEDS)

try:
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:  # transformers before it had its server in parts
    raise WiseError(_NEEDS) from error


def application(editor, name: str = "edited", editable: bool = False) -> FastAPI:
    """The server's application, for uvicorn or any other ASGI server: /v1/chat/completions, /v1/completions, ...

    Args:
        editor: a `WiseEditor`; its model is served, and no other.
        name: what requests may call the model; with a colon and the name of a pack behind it, that pack answers. Packs
            that are loaded or deleted while the server runs are asked for, or not any more, from the next request on.
        editable: also teach what is posted to /v1/edits, an edit or a list of them in any known format, and answer with
            the reports. Whoever reaches the server can then edit the model.

    Raises:
        WiseError: the editor was unloaded from its model.
    """
    projection = editor.projection  # raises where there is none any more
    manager = _One(device=str(projection.device), model_timeout=-1)
    manager.loaded_models[manager.process_model_name(name)] = _Kept(editor.model, -1, processor=editor.tokenizer)
    manager.force_model, manager.editor = name, editor
    state, refused = _State(), _Refused()
    app = build_server(
        manager,
        _Chat(manager, state),
        completion_handler=_Completion(manager, state),
        response_handler=_Response(manager, state),
        transcription_handler=refused,
        systemone_handler=refused,
        generation_state=state,
    )
    app.exception_handler(WiseError)(_told)
    if editable:
        _add_editing(app, editor)
    return app


def _add_editing(app: FastAPI, editor) -> None:
    @app.post("/v1/edits")
    async def edits(body: dict | list[dict]):
        reports = await asyncio.to_thread(editor.edit, body)
        return {"edits": [{"success": r.success, "steps": r.steps, "note": r.note} for r in reports]}


async def _told(_request, error: WiseError) -> JSONResponse:
    return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, status_code=400)


class _Asking:
    """A handler whose requests name the pack that answers them behind the model's name."""

    def _resolve_model(self, body: dict):
        name, editor = self.model_manager.force_model, self.model_manager.editor
        asked = body.get("model")
        pack = asked.removeprefix(f"{name}:") if isinstance(asked, str) else asked
        if pack == asked:
            return super()._resolve_model(body)
        known(pack, editor.routing.packs.names)
        _, model, processor = super()._resolve_model(body | {"model": name})
        body["model"] = asked
        return self.model_manager.process_model_name(asked), _Answering(model, pack), processor


class _Chat(_Asking, ChatCompletionHandler):
    pass


class _Completion(_Asking, CompletionHandler):
    pass


class _Response(_Asking, ResponseHandler):
    pass


class _Answering:
    """A model as the server sees it, whose generations ask for one pack."""

    def __init__(self, model, pack: str):
        self._model = model
        self.generate = functools.partial(model.generate, pack_names=[pack])

    def __getattr__(self, name: str):
        return getattr(self._model, name)


class _State(GenerationState):
    """One thread generates for all packs: they are one model."""

    def get_manager(self, model_id: str, use_cb: bool = False):
        return super().get_manager("", use_cb)


class _One(ModelManager):
    """A manager of the models it was given, which loads no others whatever is asked of it."""

    editor = None

    def get_gen_models(self) -> list[dict]:
        """What may be asked for, in place of a look into the cache directory."""
        names = [self.force_model, *(f"{self.force_model}:{pack}" for pack in self.editor.routing.packs.names)]
        return [{"id": name, "object": "model", "owned_by": "", "created": 0} for name in names]

    def load_model_and_processor(self, model_id_and_revision, *args, **settings):
        if model_id_and_revision not in self.loaded_models:
            raise HTTPException(404, f"{model_id_and_revision!r} is not served here")
        return super().load_model_and_processor(model_id_and_revision, *args, **settings)


class _Kept(TimedModel):
    """A model that is not the server's to delete, neither after a while nor by /reset."""

    def delete_model(self) -> None:
        self._timer.cancel()


class _Refused:
    """In the place of handlers that are not for text, or that run the model beside `generate`."""

    async def handle_request(self, *_) -> JSONResponse:
        return JSONResponse({"error": "an edited model serves chat, completions and responses"}, status_code=501)
