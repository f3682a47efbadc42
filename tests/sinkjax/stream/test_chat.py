"""A conversation is one stream: its turns, what marks them, and nothing twice."""

import itertools

import pytest

from sinkjax.cache import SinkWindow
from sinkjax.stream import TEMPLATES, Chat, Role, Session, Template, generate

CACHE = SinkWindow(3, 11)
LEAD = [261, 262, 256]
MARKED = Template(Role("U:", "\n"), Role("A:", "\n"), Role("S:", "\n"))


def chat_of(model, tokenizer, **options):
    return Chat(model, **({"cache": CACHE, "tokenizer": tokenizer, "chunk_size": 9} | options))


def continued(model, ids, count, **options):
    """What the model says after these ids, alone."""
    events = generate(model, ids, cache=CACHE, max_new_tokens=count, chunk_size=9, **options)
    return [event.token for event in events]


def tokens_of(events):
    return [event.token for event in events]


def test_answers_that_were_cut_are_closed(model, tokenizer):
    chat = chat_of(model, tokenizer, template=MARKED, system="hi", max_new_tokens=4)
    first = list(chat.send("ab"))
    ids = [*LEAD, *b"S:hi\nU:ab\nA:"]
    assert chat.session.position == len(ids) + 3
    assert first[-1].finish_reason == "length"
    second = chat.send("cd")
    assert chat.session.position == len(ids) + 3  # nothing is read before the answer is asked for
    second = tokens_of(second)
    # A turn is read in chunks where a token is drawn by a step: the numbers differ by rounding.
    assert second == continued(model, [*ids, *tokens_of(first), *b"\nU:cd\nA:"], 4)
    chat.reset()
    assert chat.session.position == 0
    assert tokens_of(chat.send("ab")) == tokens_of(first)


def test_an_answer_that_ended_by_itself_is_not_closed_again(model, tokenizer):
    ids = [*LEAD, *b"U:ab\nA:"]
    free = continued(model, ids, 40)
    end = free[5]
    spoken = free[: free.index(end) + 1]
    template = Template(MARKED.user, Role("A:", (end, 10)))
    chat = chat_of(model, tokenizer, template=template)
    first = list(chat.send("ab"))
    assert tokens_of(first) == spoken and first[-1].finish_reason == "stop"
    second = tokens_of(itertools.islice(chat.send("cd"), 3))
    # `end` was drawn; the rest of the suffix follows.
    assert second == continued(model, [*ids, *spoken, 10, *b"U:cd\nA:"], 3)[: len(second)]
    # An iterator that is left early is an answer that was cut, whatever it would have been.
    third = tokens_of(itertools.islice(chat.send("e"), 1))
    turns = [*spoken, 10, *b"U:cd\nA:", *second]
    if second[-1] != end:
        turns.append(end)
    assert third == continued(model, [*ids, *turns, 10, *b"U:e\nA:"], 1)


def test_stop_strings_that_run_into_the_next_turn(model, tokenizer):
    """A model of plain text writes the user's next prefix: it is fed no second time."""
    chat = chat_of(
        model, tokenizer, template=Template(MARKED.user, MARKED.assistant, stop=("\nU:",))
    )
    next(chat.send("ab"))
    chat.session.read([chat.session.pending, *b"x\nU:"])  # as if it had
    chat.session.position = int(chat.session.cache.time[0])
    before = chat.session.position
    next(chat.send("cd"))
    assert chat.session.position - before == len(b"cd\nA:")


def test_the_text_ends_before_the_stop(model, tokenizer):
    options = {"seed": 4}
    free = "".join(
        e.text for e in chat_of(model, tokenizer, **options, max_new_tokens=40).send("a")
    )
    stop = free[7:9]
    template = Template(stop=(stop,))
    events = list(chat_of(model, tokenizer, **options, template=template).send("a"))
    assert "".join(event.text for event in events) == free[: free.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_fifty_turns_on_one_cache(model, tokenizer, traces):
    session = Session.start(model, CACHE, seed=1)
    chat = chat_of(model, tokenizer, cache=session, max_new_tokens=3)
    sizes = {event.statistics.cache_bytes for n in range(50) for event in chat.send("x" * (n % 20))}
    assert sizes == {session.cache.nbytes} and chat.session is session
    assert session.cache.evicted[0] > 500
    # Two programs at most, which earlier tests may have compiled.
    assert len(traces) == len(set(traces)) and set(traces) <= {(1, 1), (1, 9)}


def test_known_templates(tokenizer):
    assert list(TEMPLATES) == ["plain", "chatml", "gemma", "llama3"]
    for name, template in TEMPLATES.items():
        for role in (template.user, template.assistant, template.system):
            assert role.suffix, name
        ends = template.stop or (template.assistant.suffix,)
        assert all(template.assistant.suffix.startswith(end) for end in ends)


def test_bad_input(model, tokenizer):
    with pytest.raises(ValueError, match="seed: a session has its own"):
        chat_of(model, tokenizer, cache=Session.start(model, CACHE), seed=1)
    chat = chat_of(model, tokenizer, overlength="error")
    with pytest.raises(ValueError, match="at most the 14 tokens .* got 24"):
        chat.send("x" * 20)
    assert chat.session.position == 0
