"""The same mathematics under torch.compile, as a user who knows it would write it: the rival that fuses too.

One function per case and call: guidance, update and the doubled model input in one graph (fullgraph, dynamic=False, mode
"default"). Terms whose coefficient is 0 are not there and factors of 1 are not multiplied (a function for one solver would have
neither); the other coefficients come as a tensor, because Python numbers would compile anew at every step. At a branch the
results are copied by `index_select`, which fuses too, and was faster than copying the inputs. Noise is drawn inside on a GPU,
where that fuses, and by torch.randn before the call on a CPU, where that is faster.
"""

import math

import torch
from ops_cases import GUIDANCE, WrongResult

from sage_kernels import COLUMNS

CORRECTOR = ("u0", "u1", "u2", "u3", "u4", "u5")


class CompiledUpdate:
    """The compiled contender of a case: called with one `Buffers`."""

    def __init__(self, case):
        self.case = case
        self.coefficients = [row.clone() for row in case.coefficients]
        self.updates = {i: torch.compile(_update(case, i), fullgraph=True, dynamic=False) for i in case.calls}

    def __call__(self, at):
        """Returns (x', model input, kept m0 if any, kept xc if any)."""
        x, history, last = at.x, at.history, at.last
        for i, output in zip(self.case.calls, at.outputs):
            noise = torch.randn(x.shape) if self.case.table.stochastic and x.device.type == "cpu" else None
            results = self.updates[i](x, output, self.coefficients[i], history, last, self.case.children, noise)
            x, kept = results[0], results[2:]
            history, last = (kept[:1] + history)[: self.case.table.history], kept[-1] if self.case.table.corrector else None
        return results

    def check(self):
        """Raise WrongResult unless the results agree with float64; noise, which no one else can draw, by its distribution.

        A bfloat16 state rounds away most of what that shows; the same function with a float32 state is checked closely.
        """
        case = self.case
        sample, model_input, *_ = self(case.buffers[0])
        if not case.table.stochastic:
            return case._close("torch.compile", case.exact(), (sample, None, None, model_input))
        scale = float(case.table.column("c")[case.calls[-1]])
        noise = torch.cat([sample[part].double() - wanted[0] for part, wanted in case.exact()]) / scale
        noise = noise[:: case.key.fan_out]  # children share their parent's
        rounded = (torch.finfo(case.state).eps / 2 * float(sample.abs().max()) / scale) ** 2  # adds at most this to the variance
        mean, excess, error = noise.mean().item(), noise.square().mean().item() - 1, math.sqrt(2 / noise.numel())
        if not (abs(mean) < 5 * error * math.sqrt(1 + rounded) and -6 * error - 1e-4 < excess < 6 * error + 1e-4 + 2 * rounded):
            raise WrongResult(f"{case.key.label()}: torch.compile's noise has mean {mean:.4f} and variance {1 + excess:.4f}")


def _update(case, i):
    """A function that makes call `i` of the case's solver."""
    row = dict(zip(COLUMNS, case.table.rows[i].tolist()))
    table, model, branches = case.table, case.model, case.children is not None and i == case.calls[-1]
    corrects = any(row[u] for u in CORRECTOR[1:])
    state = case.state

    def combine(k, terms):
        total = None
        for name, value in terms:
            if row[name] != 0:
                term = value if row[name] == 1 else k[COLUMNS.index(name)] * value
                total = term if total is None else total + term
        return total

    def update(x, output, k, history, last, children, noise):
        uncond, cond = output.float().chunk(2)
        y = uncond + GUIDANCE * (cond - uncond)
        x, m, last = x.float(), [h.float() for h in history] + [None] * 3, None if last is None else last.float()
        m0 = combine(k, (("p", x), ("q", y)))
        if row["clip"] < math.inf:
            m0 = m0.clamp(-row["clip"], row["clip"])
        xc = combine(k, zip(CORRECTOR, (x, last, m0, *m[:3]))) if corrects else x
        if row["c"] != 0 and noise is None:
            noise = torch.randn_like(x)
        terms = (("a", xc), ("b0", m0), ("b1", m[0]), ("b2", m[1]), ("e", y), ("c", noise))
        following = combine(k, terms)
        scaled = (following if row["s"] == 1 else k[COLUMNS.index("s")] * following).to(model)
        kept = ([m0.to(state)] if table.history else []) + ([xc.to(state)] if table.corrector else [])
        results = [following.to(state), scaled, *kept]
        if branches:
            results = [t.index_select(0, children) for t in results]
        return results[0], torch.cat([results[1], results[1]]), *results[2:]

    return update
