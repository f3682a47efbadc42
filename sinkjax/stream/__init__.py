"""Endless text from a model on a cache of constant size.

sampler     logits → token
prefill     a prompt of any length in chunks of one size
session     the state of a stream: cache, seed, last token; saved and resumed exactly
generate    an iterator of events
evaluate    loss along a text for recomputation, window, and sinks with window
"""

from sinkjax.stream.evaluate import Evaluation as Evaluation
from sinkjax.stream.evaluate import evaluate as evaluate
from sinkjax.stream.generate import Event as Event
from sinkjax.stream.generate import Statistics as Statistics
from sinkjax.stream.generate import generate as generate
from sinkjax.stream.prefill import prefill as prefill
from sinkjax.stream.sampler import Sampler as Sampler
from sinkjax.stream.session import Session as Session
