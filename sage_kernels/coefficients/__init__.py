"""Solver coefficients: every supported solver step as one line of a table, computed in float64.

    m0 = clamp(p*x + q*y, -clip, clip)                                   stored: the denoised sample (or velocity, noise, derivative)
    xc = u0*x + u1*L + u2*m0 + u3*m1 + u4*m2 + u5*m3                     x itself, but for UniPC, two-stage solvers and LMS
    x' = a*xc + b0*m0 + b1*m1 + b2*m2 + e*y + c*noise
    next model input = s*x'

Symbols:

    x         sample the model was called with (unscaled)       y      model output, after guidance
    m1 m2 m3  values stored by the previous calls               L      xc of the previous call
    alpha_t   signal scale, alpha_t = sqrt(alphas_cumprod)      A, P   alphas_cumprod now, and after the step
    sigma_t   noise scale: x_t = alpha_t*x0 + sigma_t*noise     eps    the noise in x_t, (x - alpha_t*x0)/sigma_t
    lambda_t  log(alpha_t) - log(sigma_t), half the log-SNR     h      lambda after the step minus lambda now
    s, n      sigma now, and after the step (Euler family)
    sigmas    a diffusers schedule: sigma_t/alpha_t, or sigma_t itself for flow matching (then alpha_t = 1 - sigma_t)

The Euler family keeps x scaled by 1/alpha_t (x = x0 + sigma*noise) and the model sees x/sqrt(sigma^2 + 1): column s.
Column e is for DDIM with clipping, where x0 is clipped and the predicted noise is not, and for second stages of two.

One function per solver. All take plain arrays and know nothing of any library's scheduler objects. A combination that a
row cannot express raises NotImplementedError and names the option. `start` is the first row that runs: multistep
solvers warm up from there, and the rows before it are zero.
"""

from .adams import deis, lms
from .branch import PARTED, PARTING, branch_rows
from .consistency import lcm, scm, tcd
from .flow import flow_euler, flow_euler_ancestral
from .multistep import dpmpp, edm_dpmpp
from .sigma import edm_euler, euler, euler_ancestral
from .singlestep import dpmpp_singlestep
from .table import COLUMNS, CoefficientTable
from .two_stage import flow_heun, heun, kdpm2, kdpm2_ancestral
from .unipc import unipc
from .vp import ddim, ddpm

__all__ = [
    "COLUMNS",
    "PARTED",
    "PARTING",
    "CoefficientTable",
    "branch_rows",
    "ddim",
    "ddpm",
    "deis",
    "dpmpp",
    "dpmpp_singlestep",
    "edm_dpmpp",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_euler_ancestral",
    "flow_heun",
    "heun",
    "kdpm2",
    "kdpm2_ancestral",
    "lcm",
    "lms",
    "scm",
    "tcd",
    "unipc",
]
