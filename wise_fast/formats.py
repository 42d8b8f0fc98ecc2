"""Record formats of edit files: told apart by their fields, translated to the fields of `wise_fast.data.Edit`.

canonical    prompt, target [subject, rephrases, ood_prompts, locality, irrelevant, id, truth, messages], no others;
             prompts are text or chat messages, [{"role": "user", "content": ...}]
request      prompt, target_new [...]                      the keys that model-editing tools exchange (EasyEdit)
MEND         src, alt [rephrase, subject, loc, loc_ans]    ZsRE as Mitchell et al. 2022 split it
CounterFact  requested_rewrite{prompt, target_new{str}, subject} [...]    Meng et al. 2022

In the last three, unknown fields are ignored, an optional text that is null or blank is absent, and `case_id` or `id`
becomes the id. The locality prompts of a record are for measuring, so no format's `irrelevant` is taken from them.
"""

import difflib
from collections.abc import Mapping, Sequence

from wise_fast.errors import EditDataError

_MEASURED = ("rephrases", "ood_prompts", "locality", "truth")
_PLACE = ("prompt", "answer")
CANONICAL = ("prompt", "target", "subject", "irrelevant", "id", "messages", *_MEASURED)


def shown(value: object) -> str:
    """A value as an error message shows it: its type in JSON's words and a short repr."""
    names = {dict: "object", list: "list", bool: "boolean", int: "number", float: "number", str: "text"}
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)} {text}"


def suggestion(word: str, known: tuple[str, ...]) -> str:
    """`" (did you mean 'target'?)"`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def check_text(value: object, field: str) -> str:
    """`value` if it is text with something in it; else EditDataError naming `field`."""
    if not isinstance(value, str):
        raise EditDataError(f"field '{field}': expected text, got {shown(value)}; write it as a string")
    if not value.strip():
        raise EditDataError(f"field '{field}': expected text, got {value!r}, which is blank; fill it in or drop it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        message = f"field '{field}': {shown(value)} holds half a surrogate pair, which no tokenizer reads; repair it"
        raise EditDataError(message) from None
    return value


def check_texts(values: object, field: str) -> tuple[str, ...]:
    """`values` as a tuple if it is a list or tuple of texts; else EditDataError naming `field`."""
    if not isinstance(values, (list, tuple)):
        raise EditDataError(f"field '{field}': expected a list of texts, got {shown(values)}; put it in a list")
    return tuple(check_text(value, f"{field}[{i}]") for i, value in enumerate(values))


def read_record(record: object) -> dict:
    """One record of any format as canonical fields (`locality` as dicts of prompt and answer).

    Raises EditDataError when the record is no object, fits no format or more than one, or a field is unusable.
    """
    check_object(record, None)
    matching = [signature for signature in _READERS if signature in record]
    if len(matching) > 1:
        raise EditDataError(
            f"the fields '{matching[0]}' and '{matching[1]}' belong to different formats, so which one is the edit is "
            "not known; keep one of them"
        )
    if not matching:
        found = ", ".join(f"'{key}'{suggestion(str(key), tuple(_READERS))}" for key in record) or "none"
        raise EditDataError(
            f"unknown format: fields found: {found}; expected one of: prompt, target (canonical); prompt, target_new "
            "(request); src, alt (MEND); requested_rewrite (CounterFact); rename the fields to one of these"
        )
    return _READERS[matching[0]](record)


def check_object(value: object, field: str | None, fields: Sequence[str] = ()) -> Mapping:
    """`value` if it is a mapping; else EditDataError naming `field` (None: the record) and what belongs in it."""
    if not isinstance(value, Mapping):
        where = f"field '{field}': " if field else ""
        held = ", ".join(f'"{name}": ...' for name in fields) or "..."
        raise EditDataError(f"{where}expected an object with named fields, got {shown(value)}; write it as {{{held}}}")
    return value


def _check_known(record: Mapping, known: tuple[str, ...], inside: str = "") -> None:
    for key in record:
        if key not in known:
            raise EditDataError(
                f"unknown field '{inside}{key}'{suggestion(str(key), known)}; expected: {', '.join(known)}; rename or "
                "drop it"
            )


def _read_canonical(record: Mapping) -> dict:
    _check_known(record, CANONICAL)
    fields = {key: value for key, value in record.items() if value is not None}
    fields |= {"prompt": _prompt(record), "target": _required(record, "target")}
    places = fields.get("locality", [])
    if not isinstance(places, (list, tuple)):
        raise EditDataError(f"field 'locality': expected a list of objects, got {shown(places)}; put it in a list")
    fields["locality"] = []
    for i, place in enumerate(places):
        inside = f"locality[{i}]"
        _check_known(check_object(place, inside, _PLACE), _PLACE, f"{inside}.")
        answer = place.get("answer")
        answer = answer if answer is None else check_text(answer, f"{inside}.answer")
        fields["locality"].append({"prompt": _prompt(place, f"{inside}."), "answer": answer})
    return fields


def _read_request(record: Mapping) -> dict:
    locality = []
    for name, place in _object(record, "locality").items():
        inside = f"locality.{name}."
        check_object(place, inside[:-1])
        if "prompt" not in place:
            raise EditDataError(f"field '{inside}prompt' is missing; add it, or drop '{inside[:-1]}'")
        locality += _locality(place, "prompt", "ground_truth", inside)
    return {
        "prompt": _prompt(record),
        "target": _required(record, "target_new"),
        "subject": _optional(record.get("subject"), "subject"),
        "rephrases": _texts(record, "rephrase_prompt"),
        "ood_prompts": _texts(record, "ood_rephrase"),
        "locality": locality + _locality(record, "locality_prompt", "locality_ground_truth"),
        "irrelevant": _optional(record.get("loc_prompt"), "loc_prompt"),
        "id": _identity(record),
        "truth": _truth(record),
    }


def _read_mend(record: Mapping) -> dict:
    targets = record.get("alt")
    if targets == []:
        raise EditDataError("field 'alt': expected text or a list of texts, got an empty list; add the new target")
    return {
        "prompt": _required(record, "src"),
        "target": check_text(targets[0], "alt[0]") if isinstance(targets, list) else _required(record, "alt"),
        "subject": _optional(record.get("subject"), "subject"),
        "rephrases": _texts(record, "rephrase"),
        "locality": _locality(record, "loc", "loc_ans"),
        "id": _identity(record),
    }


def _read_counterfact(record: Mapping) -> dict:
    rewrite, inside = check_object(record["requested_rewrite"], "requested_rewrite"), "requested_rewrite."
    template, subject = _required(rewrite, "prompt", inside), _required(rewrite, "subject", inside)
    if "{}" not in template:
        raise EditDataError(
            f"field '{inside}prompt': expected '{{}}' where the subject goes, got {shown(template)}; put '{{}}' there"
        )
    target = check_object(rewrite.get("target_new"), f"{inside}target_new")
    # The neighbourhood prompts are about other subjects for which the edit's old target is the true answer.
    truth = _optional(_object(rewrite, "target_true", inside).get("str"), f"{inside}target_true.str")
    return {
        "prompt": template.replace("{}", subject),
        "target": _required(target, "str", f"{inside}target_new."),
        "subject": subject,
        "rephrases": _texts(record, "paraphrase_prompts"),
        "locality": [{"prompt": prompt, "answer": truth} for prompt in _texts(record, "neighborhood_prompts")],
        "id": _identity(record),
        "truth": truth,
    }


_READERS = {
    "target": _read_canonical,
    "target_new": _read_request,
    "src": _read_mend,
    "requested_rewrite": _read_counterfact,
}


def _required(record: Mapping, key: str, inside: str = "") -> str:
    if key not in record:
        raise EditDataError(f"field '{inside}{key}' is missing; expected text; add it")
    return check_text(record[key], inside + key)


def _prompt(record: Mapping, inside: str = "") -> object:
    """Text, or chat messages, which the Edit checks."""
    given = record.get("prompt")
    return given if isinstance(given, (list, tuple)) else _required(record, "prompt", inside)


def _optional(value: object, field: str) -> str | None:
    absent = value is None or (isinstance(value, str) and not value.strip())
    return None if absent else check_text(value, field)


def _object(record: Mapping, key: str, inside: str = "") -> Mapping:
    value = record.get(key)
    return {} if value is None else check_object(value, inside + key)


def _texts(record: Mapping, key: str) -> tuple[str, ...]:
    """The texts of a field that is a text or a list of them, without the blank ones."""
    value = record.get(key)
    if isinstance(value, list):
        found = [_optional(text, f"{key}[{i}]") for i, text in enumerate(value)]
    else:
        found = [_optional(value, key)]
    return tuple(text for text in found if text is not None)


def _truth(record: Mapping) -> str | None:
    """What a request's target replaces: the first of `ground_truth`, unless it is EasyEdit's filler for none."""
    found = next(iter(_texts(record, "ground_truth")), None)
    return None if found == "<|endoftext|>" else found


def _identity(record: Mapping) -> str | None:
    value = record.get("case_id", record.get("id"))
    return str(value) if isinstance(value, (int, str)) and str(value).strip() else None


def _locality(record: Mapping, prompt_key: str, answer_key: str, inside: str = "") -> list[dict]:
    """Prompts paired with their answers; one prompt may have a list of answers, of which the first is taken."""
    prompts, answers = record.get(prompt_key), record.get(answer_key)
    if not isinstance(prompts, list):
        prompts, answers = [prompts], answers[:1] if isinstance(answers, list) else [answers]
    if answers is None or answers == []:
        answers = [None] * len(prompts)
    if not isinstance(answers, list) or len(answers) != len(prompts):
        count = len(answers) if isinstance(answers, list) else shown(answers)
        raise EditDataError(
            f"field '{inside}{answer_key}': expected {len(prompts)} answers, as many as there are prompts in "
            f"'{inside}{prompt_key}', got {count}; pair them"
        )
    pairs = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        index = f"[{i}]" if isinstance(record.get(prompt_key), list) else ""
        prompt = _optional(prompt, f"{inside}{prompt_key}{index}")
        if prompt is not None:
            pairs.append({"prompt": prompt, "answer": _optional(answer, f"{inside}{answer_key}{index}")})
    return pairs
