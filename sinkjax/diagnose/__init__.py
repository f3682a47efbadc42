"""Diagnosis: what a model does with its sinks, in numbers, figures and one self-contained page.

`analyze` measures, `capture` shows everything on a few tokens, `plots` draws, and `write_report`
puts it on a page.
"""

from sinkjax.diagnose import plots as plots
from sinkjax.diagnose.analysis import analyze as analyze
from sinkjax.diagnose.analysis import rows_of_texts as rows_of_texts
from sinkjax.diagnose.capture import Capture as Capture
from sinkjax.diagnose.capture import capturable as capturable
from sinkjax.diagnose.capture import capture as capture
from sinkjax.diagnose.metrics import METRICS as METRICS
from sinkjax.diagnose.metrics import Settings as Settings
from sinkjax.diagnose.page import Section as Section
from sinkjax.diagnose.page import write_report as write_report
from sinkjax.diagnose.report import Report as Report
from sinkjax.diagnose.sparsity import Kept as Kept
from sinkjax.diagnose.sparsity import sparse_recall as sparse_recall
