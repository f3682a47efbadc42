"""Endless text from a model on a cache of constant size.

sampler     logits → token
prefill     a prompt of any length in chunks of one size
prompt      what leads a prompt, and what becomes of one that is longer than the cache
state       where a stream stands; events: what it tells; stop: strings that end it
detect      which tokens of a prompt are sinks; pinned in its cache
session     the state and the cache of a stream: saved, resumed, forked exactly; trim: undone
generate    an iterator of events; steps: the programs it runs
batch       many streams that share a step, and come and go between steps; rows: of their cache
structure   a model as what programs are kept by, its arrays, and the mesh it lies on
chat        a conversation, turn by turn
score       loss along a text of any length
evaluate    loss along a text for recomputation, window, and sinks with window
"""

from sinkjax.stream.batch import Batch as Batch
from sinkjax.stream.chat import TEMPLATES as TEMPLATES
from sinkjax.stream.chat import Chat as Chat
from sinkjax.stream.chat import Role as Role
from sinkjax.stream.chat import Template as Template
from sinkjax.stream.detect import detect_sinks as detect_sinks
from sinkjax.stream.evaluate import Evaluation as Evaluation
from sinkjax.stream.evaluate import evaluate as evaluate
from sinkjax.stream.events import Event as Event
from sinkjax.stream.events import Statistics as Statistics
from sinkjax.stream.generate import generate as generate
from sinkjax.stream.prefill import prefill as prefill
from sinkjax.stream.sampler import Sampler as Sampler
from sinkjax.stream.score import Scores as Scores
from sinkjax.stream.score import score as score
from sinkjax.stream.session import Session as Session
