"""The clauses of statements that say several things, and which requirements try each.

A statement counts as tried when one of its clauses is. So each clause is listed here by itself: with the ids of
requirements, or with a dash and the reason why there is none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from .coverage import cited

CLAUSES = """
D1 | y is the base's output plus the update of the adapter | FORWARD-001
D1 | the updates of all active adapters are summed | ADAPTER-003
D2 | A (r, in) and B (out, r) | SHAPE-001
D2 | no bias in either: A and B are all that trains | GRAD-011 MODEL-003
D3 | A and B have the shapes of a linear layer's | SHAPE-002
D3 | what is merged is s (B A)^T as stored | MERGE-002
D4 | A (r, V) and B (d, r) | SHAPE-003
D4 | row i of the output is E[i] + s B a_i | FORWARD-003 LAW-005 SHAPE-016
D4 | what is merged is s (B A)^T, shape (V, d) | MERGE-003 MERGE-013
D4 | A and B are bare parameters, and their keys have no ".weight" | FILE-002
D4 | embed_scale multiplies the branch too | LAYEROPT-010 LAYEROPT-011
D4 | embed_scale is in the gradient too | LAYEROPT-012
D4 | the forward applies A's column at padding_idx | GRAD-015 MERGE-032
D4 | the gradient of that column is zero | GRAD-015
D5 | in one, two and three dimensions | FORWARD-004 FORWARD-005 FORWARD-006
D5 | A has the base's kernel | SHAPE-004 SHAPE-005 SHAPE-006 LAYEROPT-005
D5 | A has the base's stride and padding, the same number along every axis | FORWARD-004 FORWARD-005 FORWARD-006
D5 | stride, padding and dilation may differ from axis to axis | LAYEROPT-018
D5 | padding may be "same" or "valid" | - LayerSpec has padding as a number
D5 | A has the base's dilation | FORWARD-020 FORWARD-021 FORWARD-022 GRAD-019
D5 | A has the base's padding_mode | LAYEROPT-003 LAYEROPT-004
D5 | B is a convolution with a kernel of 1 | SHAPE-004 SHAPE-005 SHAPE-006 LAW-006
D5 | what is merged is s sum_q B[o, q] A[q, i, ...] | MERGE-004 MERGE-005 MERGE-006 LAYEROPT-006
D5 | an r that groups do not divide is refused | - every grouped case has r = groups: a dense B may take any r
D5 | in groups A sees all inputs, and B is in groups | LAYEROPT-001
D5 | in groups the merge is right or refused | LAYEROPT-002
D6 | an adapter on out_proj is refused or acts | TARGET-025
D7 | two dimensions: (out, in) | FORWARD-007 SHAPE-007
D7 | three dimensions: each expert has an update of its own | FORWARD-008 SHAPE-008 LAW-007
D7 | module.is_transposed turns the stored parameter | - the raw parameters of the contract are stored as (out, in)
D7 | dropout with a raw parameter is refused | - an implementation may apply it; P3 says so too
D7 | fan_in_fan_out and lora_bias with a raw parameter are refused | - options that say nothing about a raw parameter
D7 | merged is unmerged | MERGE-007 MERGE-008 MERGE-017 MERGE-018
D8 | r is an integer above 0 | ERROR-001 ERROR-014
D8 | through rank_pattern too | ERROR-002
D8 | r may exceed min(in, out) for True | SHAPE-009
D8 | pissa, olora, corda, loftq, mica refuse a larger r, or are right | PISSA-007 OLORA-007 CORDA-011 LOFTQ-007 MICA-007
S1 | s = a / r | SCALE-001
S1 | with use_rslora s = a / sqrt(r) | SCALE-002
S1 | r and a are 8 where nothing is said | FILE-009
S2 | rank_pattern gives r | PATTERN-001
S2 | alpha_pattern gives a, on its own | PATTERN-002 PATTERN-003
S3 | a = 0 gives s = 0 | SCALE-004
S3 | a negative a turns the update | SCALE-005
S3 | starts that divide by s need s > 0 | PISSA-015 OLORA-014 CORDA-012 LOFTQ-008
S3 | an a that is not finite is refused | ERROR-012
S4 | set_scale, scale_layer, unscale_layer, with None too | SCALE-006
S5 | s multiplies the branch | SCALE-007
S5 | s does not change dropout | - dropout is tried with one s only
P1 | p = 0 drops nothing | DROP-009
P1 | inverted and elementwise | DROP-001 DROP-005 DROP-015
P1 | on the input of A | DROP-016
P1 | in training mode only | DROP-007 CONTEXT-012 CONTEXT-013
P1 | the base sees the whole input | DROP-008
P2 | each active adapter draws its own mask | DROP-014
P2 | merged: no dropout in training either | DROP-011
P3 | embeddings drop nothing | DROP-013
P3 | target_parameters with dropout are refused | - an implementation may apply it
P4 | p = 1: the branch is 0 in training | DROP-010
P4 | outside of [0, 1], or NaN: refused | ERROR-003 ERROR-013
B2 | every bias trains, of norms and untargeted layers too | BIAS-002
B2 | parameters named *_bias and bias_* too | - the modules of the contract have "bias" only
B2 | files keep PEFT's keys | FILE-030
B4 | before training the output is the base's | BIAS-005
B4 | disabling does not restore them | BIAS-007
B4 | unloading does not restore them | BIAS-010
B4 | deleting and switching do not restore them | BIAS-012
B4 | disabling warns | - warnings are not part of the contract
B5 | merging does not touch biases | BIAS-008 MERGE-026
B5 | merged output is adapted output | BIAS-008 BIAS-011
B6 | a second adapter with a bias mode is refused | BIAS-014
B6 | which biases train follows the active adapter, and back | BIAS-013 BIAS-015
B6 | loading overwrites the biases in place | BIAS-016
F1 | a wrong fan_in_fan_out is corrected or refused | MODEL-017
F1 | it is corrected with a warning | - warnings are not part of the contract
F1 | the given configuration is not changed | - the contract gives mappings, from which each adapter makes an object
F3 | every start on the logical weight | PISSA-003 PISSANITER-003 OLORA-003 CORDA-007 LOFTQ-005 LAW-004
F3 | every merge on the logical weight | MERGE-002 LAW-004
I1 | linear and transposed | INIT-001 INIT-002
I1 | convolutions: fan_in is in times the kernel | INIT-003 INIT-004 INIT-005
I3 | linear: standard deviation 1 / r, B = 0 | INIT-009
I3 | an embedding starts as with True | INIT-010
I4 | neither factor is zero | INIT-011 INIT-020
I4 | an embedding draws both from N(0, 1) | - INIT-011 asks for numbers that differ, not for their spread
I6 | True: D = 0, W bit for bit | INIT-001 INIT-018 TARGET-023
I6 | gaussian: D = 0 | INIT-009
I6 | eva: D = 0, W bit for bit | EVA-001
I6 | mica: D = 0, W bit for bit | MICA-001
I7 | other letters are that start or refused | INIT-023
I7 | pissa_niter needs an integer n >= 0 | - ERROR-005 tries names that no start has, and not a wrong n
I8 | other starts of a convolution or an embedding are refused | PISSA-017 OLORA-015
T1 | factors of half precision are float32 | SHAPE-010
T1 | factors of float64 are float64 | SHAPE-015
T1 | autocast_adapter_dtype=False keeps half precision factors | - an argument of get_peft_model, not an option
T2 | the branch is computed in float32 | SHAPE-014
T2 | the output is in the base's dtype, with one more rounding | SHAPE-013 FORWARD-014
T3 | the update is computed in at least float32 and rounded once | MERGE-027
T3 | unmerging restores W bit for bit | MERGE-029
T4 | float64 starts stay float64 | PISSA-016 OLORA-016 CORDA-013
T4 | the residual is made of the factors as stored | PISSA-005 OLORA-005 PISSANITER-005
Q2 | W_res + s B A = W | PISSA-001
Q2 | s B A is the best approximation, for every alpha | PISSA-010 PISSA-011
Q2 | the singular values of W_res | PISSA-012
Q2 | lengths and right angles of A's rows and B's columns | PISSA-013
Q2 | B^T W_res = 0 and W_res A^T = 0 | PISSA-014
Q3 | W_res + s B A = W | PISSANITER-001
Q3 | s B A is near the best approximation | PISSANITER-010
Q3 | the same seed gives the same factors | PISSANITER-011
Q5 | Conv1D too | PISSA-003
Q5 | switched off, the original | PISSA-006 PISSANITER-006 OLORA-006
Q5 | unloaded, the original | - the models of the contract that are unloaded start with True
O1 | B^T B = 1 | OLORA-010
O1 | A is upper trapezoidal | OLORA-011
O1 | W_res + s B A = W | OLORA-001
O1 | B A is W in the first r columns | OLORA-012
O1 | A and B do not depend on alpha | OLORA-013
G1 | r is even | ERROR-006
G1 | W is untouched | INIT-015
G2 | B A = 0 although A and B are not | INIT-015
G2 | A and B have the rank r / 2 | INIT-016
G2 | the spread of the numbers | - the formula's 1 / 10 is a habit of PEFT's, not a need
G2 | alpha does not matter | INIT-017
L1 | the base is Q, A and B from the last SVD | LOFTQ-001 LOFTQ-002
L1 | further iterations quantise W - B A | LOFTQ-006
L2 | NormalFloat codes | LOFTQ-001
L2 | blocks of 64 by their largest number | LOFTQ-001
L2 | the uniform map and int8 | - starts that lora_ref does not have
L3 | Q + s B A does not depend on alpha | LOFTQ-004
L3 | transposed storage is quantised as the logical W | LOFTQ-005
L5 | loftq without a configuration is refused | ERROR-016
L5 | a configuration without loftq warns | - warnings are not part of the contract
L5 | a quantised model is refused | - the contract has no quantised layers
K1 | C over all calls | CORDA-004
K1 | the mean, not the sum | CORDA-008
K3 | ipm: the first r | CORDA-002
K3 | kpm: the last r | CORDA-003
K4 | W_res + s B A = W | CORDA-001
K4 | alpha does not matter | CORDA-006
K4 | columns of B at right angles, of the length sqrt(S_k / s) | CORDA-005
K4 | Conv1D too | CORDA-007
K5 | a larger r is refused | CORDA-011
K5 | rank_pattern and every form of target_modules | - only layers are given CorDA's data by the contract
K5 | a saved adapter loads without the data | - only layers are given CorDA's data by the contract
E1 | the adapters are off while data is seen | - B is 0 then, so that nothing changes if they are on
E1 | masked positions have no influence | - inputs of the contract have no masks
E3 | means are taken off | EVA-004
E3 | all batches count, their means too | EVA-008 EVA-009
E3 | small batches are skipped | - how batches are skipped is left open; every batch of the contract has enough tokens
E5 | the budget goes to the largest shares, at most r rho | EVA-011
E5 | rho = 1 keeps the ranks | EVA-016
E6 | A A^T = 1 | EVA-002
E6 | B = 0 | EVA-001 EVA-006
E6 | whiten | EVA-005
E6 | rank 0: no adapter | EVA-011
E7 | adjust_scaling_factors keeps s, with rsLoRA too | EVA-013
E7 | without it s follows the rank | EVA-014
E8 | a reload gives the same model | EVA-015
E9 | rho and tau are checked | ERROR-017
E9 | more components than inputs are refused | EVA-010
E9 | it ends, and warns, without convergence | - warnings are not part of the contract
M1 | B is the minor left singular vectors | MICA-002 MICA-003
M1 | of an embedding too | MICA-004
M1 | A = 0, W untouched | MICA-001
M1 | only A trains, after switching too | MICA-005 MICA-006
M1 | r > min(in, out) is refused | MICA-007
R2 | the directions of the gradient | LORAGA-002
R2 | without its singular values | LORAGA-003
R2 | W - s B A | LORAGA-001
V2 | a trained adapter acts on the original base | FILE-016 FILE-017
V2 | with rsLoRA | FILE-018
V2 | with patterns | FILE-019
V2 | the configuration in memory stays | FILE-013
V5 | a start that moves W is saved so that it loads on the original | FILE-016 FILE-017 FILE-018 FILE-019
U1 | merging twice is merging once | MERGE-021 MODEL-005
U1 | only active adapters by default | ADAPTER-009 ADAPTER-010
U1 | what is active and not merged acts beside what is merged | ADAPTER-012
U2 | off: the base's output | OFF-001 MODEL-007 CONTEXT-001
U2 | off while merged | OFF-003 MODEL-008 CONTEXT-006
U2 | off after a start that moves W: the original | PISSA-006 OLORA-006 CORDA-009 LORAGA-004
U2 | afterwards everything is as before | CONTEXT-004 ADAPTER-014
U2 | after an exception, too | CONTEXT-003
U3 | setting while merged | ADAPTER-013 MERGED-013
U3 | deleting what is merged | ADAPTER-020
U3 | mixed batches while merged or in training | BATCH-006
U4 | no weight that is not finite | MERGE-030
U4 | all modules merge or none | MODEL-013
U5 | plain modules with W + s B A | MODEL-009
U5 | the original object, changed in place | - the contract sees numbers, not objects
U6 | the base bit for bit | MODEL-010 MODEL-011
U6 | the originals of modules_to_save | SAVED-008
U6 | trained biases stay | BIAS-010
U6 | the original weight after a start that moves W | - the models of the contract that are unloaded start with True
U7 | a new adapter is inactive and frozen | ADAPTER-001
U7 | the one that is set acts and trains alone | ADAPTER-002
U7 | several active: updates add | ADAPTER-003
U8 | each sample as alone, __base__ as none | BATCH-001
U9 | cat: exact, r is the sum | WEIGHT-001 WEIGHT-002
U9 | svd: exact where the rank suffices | WEIGHT-006
U9 | linear: sums of the factors | WEIGHT-007
U9 | parents with rsLoRA and patterns | WEIGHT-016 WEIGHT-017 WEIGHT-018
U9 | base weights are untouched | WEIGHT-011
U9 | as many weights as names | WEIGHT-013
U9 | one adapter with weight 1 changes nothing | WEIGHT-003 WEIGHT-004 WEIGHT-005
Z2 | a copy for each adapter | SAVED-001 SAVED-007
Z2 | trained in full | SAVED-002
Z2 | the original is used when it is off | SAVED-004
Z2 | never LoRA-targeted | SAVED-005
N1 | modules_to_save, exclude, target | TARGET-014 SAVED-005
N2 | the whole name, or an end after a dot | TARGET-001 TARGET-015
N2 | items are no regexes | TARGET-001
N3 | the whole name | TARGET-002 TARGET-016
N3 | all-linear in any case | TARGET-003
N4 | every linear layer of a plain model, and no other | TARGET-003
N4 | the output layer of a transformers model, or of SEQ_CLS, is left out | - the contract has no transformers models
N5 | [] and "" are errors | ERROR-009
N5 | None: the table | - the models of the contract have no model_type
N6 | the rules of target_modules | TARGET-004 TARGET-005
N6 | beats a full name | TARGET-006
N6 | a parent does not exclude its children | TARGET-007
N6 | an exclude without use warns | - warnings are not part of the contract
N7 | a string as target is refused | ERROR-008
N7 | numbers, [] and negative ones | TARGET-010
N7 | the first number wins | TARGET-011
N7 | layers_pattern, at the root too | TARGET-012
N7 | layers_pattern without numbers is refused | ERROR-007
N7 | a full name is restricted too | TARGET-013
N8 | the first key that matches | PATTERN-004
N8 | reaches the end of the name | PATTERN-005
N8 | starts at any dot; ^ | PATTERN-006
N8 | a key is a regex | PATTERN-007
N8 | wrong values are refused | ERROR-002 ERROR-015
N8 | {} is no pattern | PATTERN-008
N8 | a key without a match warns | - warnings are not part of the contract
N9 | nothing matched | ERROR-010
N9 | everything excluded | ERROR-018
N9 | a type that is not supported | ERROR-011
N9 | what matched nothing warns by name | - warnings are not part of the contract
N10 | a whole name or an end after a dot | SAVED-006
N10 | heads of a task are saved | - the models of the contract have no task
N10 | containers are refused | - the models of the contract have no containers that are called
N11 | names and ends of names | TARGET-017 TARGET-024
N11 | a string is refused | - the contract gives lists
X1 | a configuration and a safetensors file | FILE-002 FILE-003
X1 | adapters in folders of their names | FILE-014
X2 | lora_A.weight and lora_B.weight | FILE-002
X2 | lora_embedding_A and lora_embedding_B | FILE-002
X2 | raw parameters, attentions and magnitudes | - the models of files are chains of linear layers and embeddings
X3 | shapes are logical, and s is computed anew | FILE-001 PATTERN-026
X4 | all and lora_only | FILE-030
X5 | <module>.<parameter> | FILE-031
X5 | the further keys that PEFT writes with bias="all" | - they say nothing that the other keys do not
X8 | the shortest configuration | FILE-005 FILE-009
X8 | options that change the maths are errors | FILE-026
X8 | missing, extra, wrong, not finite, cut off | FILE-020 FILE-021 FILE-022 FILE-023 FILE-024 FILE-025
X8 | the model is untouched | FILE-020 FILE-027 FILE-028
X8 | float16 into float32 | FILE-006
X9 | loaded to be used: frozen | FILE-011
X9 | a merged model saves A and B | FILE-012 MERGED-006
X10 | no dot, not empty | ADAPTER-022
"""


@dataclasses.dataclass(frozen=True)
class Clause:
    """One thing that a statement says: the requirements that try it, or the reason why none does."""

    statement: str
    text: str
    ids: tuple[str, ...]
    reason: str


def clauses() -> Iterator[Clause]:
    """All clauses, in the order of the statements."""
    for line in CLAUSES.strip().splitlines():
        statement, text, tried = line.split(" | ")
        if tried.startswith("- "):
            yield Clause(statement, text, (), tried.removeprefix("- "))
        else:
            yield Clause(statement, text, tuple(tried.split()), "")


def statements_of_one_clause() -> set[str]:
    """The statements that are not listed by clauses, and that a requirement's source names."""
    return {number for number, ids in cited().items() if ids} - {clause.statement for clause in clauses()}


def table() -> str:
    """How many clauses of each statement are tried, and the clauses that are not, with the reason, in Markdown."""
    found = list(clauses())
    tried = sum(bool(clause.ids) for clause in found)
    statements = len({clause.statement for clause in found})
    lines = [f"{tried} of the {len(found)} clauses of {statements} statements have a requirement. The others:", ""]
    lines += ["| Statement | Clause | Why no requirement tries it |", "|---|---|---|"]
    lines += [f"| {c.statement} | {escaped(c.text)} | {escaped(c.reason)} |" for c in found if not c.ids]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text for a cell of a table in Markdown."""
    return re.sub(r"([|*_<>])", r"\\\1", text)
