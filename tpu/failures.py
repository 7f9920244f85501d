"""Why a TPU cannot be used: one sentence on what is wrong and one on what mends it."""

import re

SHOWN_CHARACTERS = 200


class Fault(RuntimeError):
    """Something is not as a run needs it; the text is one line.

    Attributes:
      what: what was expected and what came, without a full stop.
      remedy: what to do, beginning with "Remedy: " or "Tried: ".
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}")
        self.what = what
        self.remedy = remedy


NEVER_FOUND = "Tried: a TensorFlow server at this address. Check: that"
_SAME_NETWORK = "that this machine is in its network, that both run the same TensorFlow"
NO_ANSWER = (
    f"{NEVER_FOUND} the TPU is READY, its address and port (8470 as a rule), {_SAME_NETWORK}"
)
LOCAL_NO_ANSWER = (
    "Tried: the TPU of this machine, through libtpu. Check: that this is a TPU VM, that "
    "`tensorflow-tpu` and `libtpu` are installed (`python -m tpu.doctor --tpu=local`), that no other "
    "process holds the TPU"
)
# What TensorFlow says, and what it means; the first that fits. Where no cause can be told from the
# text, the text itself is shown.
_MEANINGS = [
    (
        r"already in use|Device or resource busy|lockfile",
        "another process holds the TPU",
        "Remedy: end it (`sudo lsof -w /dev/accel* /dev/vfio/*` shows it), then start again; where there "
        "is none, `sudo rm /tmp/libtpu_lockfile`",
    ),
    (
        r"Op type not registered|NodeDef (mentions|missing) attr|[Uu]nknown method|UNIMPLEMENTED"
        r"|Unable to parse|version mismatch|incompatible",
        "the TensorFlow here and the one that drives the TPU do not understand each other",
        "Remedy: the same version of both: `pip list | grep tensorflow` here and on the TPU VM; for a "
        "TPU of Google's runtime, one made with `--version=tpu-vm-tf-` and the version here",
    ),
    (
        r"ConfigureDistributedTPU|TPUs not found|TPU_SYSTEM|No TPU|no TPU devices",
        "the TensorFlow that answers has no TPU",
        "Remedy: on the machine that answers, see `python -m tpu.doctor --tpu=local`: it needs "
        "`tensorflow-tpu` in place of `tensorflow`, `libtpu`, and chips that no other process holds",
    ),
    (
        r"[Uu]navailable|[Ff]ailed to connect|Connection (refused|reset)|Socket closed|DEADLINE",
        "the connection was lost",
        f"{NEVER_FOUND} the TPU is still READY and was not preempted, {_SAME_NETWORK}",
    ),
]


def from_tensorflow(error: Exception, otherwise: str) -> Fault:
    """Explains what TensorFlow raised while it connected to a TPU or started it.

    Args:
      error: of TensorFlow, Google's client or their transports, which raise what they like.
      otherwise: the remedy where the text of the error tells nothing.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    shown = text[:SHOWN_CHARACTERS]
    for pattern, meaning, remedy in _MEANINGS:
        if re.search(pattern, text):
            return Fault(f"{meaning} ({shown})", remedy)
    return Fault(f"no TPU found ({shown})", otherwise)
