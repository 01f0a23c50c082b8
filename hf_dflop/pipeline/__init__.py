"""Stock vision-language models over pipelines of different, ragged stages.

model        PipelineModel: a step of a rank's share of the model
weights      that share: parameters, gradients, norms, clipping, saving
topology     which rank runs which stages for which replica
shape        the shapes of a step, known on every rank
batch        one rank's inputs of a step
bridge       which encoder replica encodes what, and where its rows go
structure    where a model can be cut; shell, split: the modules of the stages; encoder: those of the encoder
stage        a stage on torch.distributed.pipelining; wire: what it is told; schedule: its runtime
features, kinds, handshake, board   the format of features of images and of videos
deferred     calling the model in a hand-written loop: gradients that wait for `loss.backward()`
check, check_encoder  the stages tried on a small copy
grads, loss  sums over replicas, tied weights, the true norm
reading      of a checkpoint, what this rank needs; checkpoint: one stock checkpoint out
recorder, trace   what each rank really did, and when
"""

from hf_dflop.pipeline.batch import StepBatch, StepResult, build_batch
from hf_dflop.pipeline.deferred import PipelineOutput
from hf_dflop.pipeline.model import PipelineModel
from hf_dflop.pipeline.shape import MicrobatchShape, StepShape
from hf_dflop.pipeline.topology import Topology
from hf_dflop.pipeline.trace import PipelineTrace

__all__ = [
    "MicrobatchShape",
    "PipelineModel",
    "PipelineOutput",
    "PipelineTrace",
    "StepBatch",
    "StepResult",
    "StepShape",
    "Topology",
    "build_batch",
]
