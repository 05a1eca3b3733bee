"""Builds the native code: the kernels, sage_kernels._C, and the grouping core, sage_kernels._grouping. All else is in pyproject.toml.

SAGE_BUILD=auto   (default) C++ kernels on Linux x86-64 if torch's headers and a C++ compiler are there, else a pure-Python
                  package which works and says at first use what is missing and how to get it; CUDA kernels too if torch is
                  built for CUDA and nvcc is there
SAGE_BUILD=cpu    C++ kernels, or fail
SAGE_BUILD=cuda   C++ and CUDA kernels, or fail; needs nvcc but neither a GPU nor a torch built for CUDA
SAGE_BUILD=none   pure Python
CXX, CUDACXX      the compilers, c++ and nvcc unless set
SAGE_CUDA_ARCHS   GPU architectures; unless set, those of "80;90;100;120" that nvcc knows; newer ones run from the PTX of the first

What was built, or why not, is recorded in sage_kernels/_build_info.json.

pip builds in an isolated environment without torch, and downloading a second torch there only to read its headers would take
gigabytes. So torch is no build requirement: an isolated build reads the torch of the environment it installs into, if there is
one. The kernels use torch's stable ABI and Python's: they load with every torch from 2.10 and every Python from 3.10 on. The
grouping core knows no torch; it is made by pybind11, for the Python that builds it, and with it the wheel.
"""

import glob
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("SAGE_BUILD", "auto")
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
OLDEST_TORCH = (2, 10)
TESTED = "linux-x86_64"  # where "auto" builds native kernels
SOURCES = sorted(glob.glob("csrc/*.cpp", root_dir=HERE)) + ["csrc/cpu/kernels_cpu.cpp"]
CUDA_SOURCES = sorted(glob.glob("csrc/cuda/*.cu", root_dir=HERE))
HEADERS = sorted(f for kind in ("h", "cuh") for f in glob.glob(f"csrc/**/*.{kind}", root_dir=HERE, recursive=True))
ARCHS = ["80", "90", "100", "120"]  # unless SAGE_CUDA_ARCHS chooses; those that nvcc does not know are left out
# Products and sums are rounded one by one (-ffp-contract=off), so that every backend gives the same bits.
COMPILE = [
    "-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall",
    "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
# The .cu files know no torch: nvcc compiles them to objects, and a static runtime makes a library that loads without CUDA.
NVCC = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
GROUPING = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wall"]
CUDART = ["cudart_static", "dl", "rt", "pthread"]


def say(message):
    print(f"[sage] {message}", file=sys.stderr, flush=True)


class Missing(Exception):
    """Something the native build needs is not there: reason, and the command that mends it."""

    def __init__(self, reason, mend):
        super().__init__(f"{reason}. To mend it: {mend}")
        self.reason, self.mend = reason, mend


def compiler():
    """First line of the C++ compiler's version."""
    command = os.environ.get("CXX", "").split() or ["c++"]
    if shutil.which(command[0]) is None:
        raise Missing(f"there is no C++ compiler ({command[0]!r} is not on PATH)", f"apt install g++ && {REINSTALL}")
    run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if run.returncode:
        reason = f"the C++ compiler does not run ({' '.join(command)!r} --version: exit status {run.returncode})"
        raise Missing(reason, f"apt install g++ && CXX=g++ {REINSTALL}")
    return run.stdout.split("\n")[0]


def nvcc():
    """(path of nvcc, its release, the folder of its runtime library, the GPU architectures to build for)."""
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("CUDACXX") or "nvcc"
    at_home = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    path = shutil.which(wanted) or (at_home if wanted == "nvcc" and os.path.exists(at_home) else None)
    if path is None:
        reason = f"there is no CUDA compiler ({wanted!r} is not on PATH)"
        raise Missing(reason, f"install the CUDA toolkit, then SAGE_BUILD=cuda {REINSTALL}")
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    dry = subprocess.run([path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True).stderr
    folders = re.findall(r"-L([^\"\s]+)", dry)
    folder = next((f for f in folders if os.path.exists(os.path.join(f, "libcudart_static.a"))), None)
    if release is None or folder is None:
        raise Missing(f"{path} does not run or lacks libcudart_static.a", f"install the whole CUDA toolkit, then SAGE_BUILD=cuda {REINSTALL}")
    return path, release[1], os.path.normpath(folder), architectures(path)


def architectures(path):
    wanted = os.environ.get("SAGE_CUDA_ARCHS")
    if wanted is not None:
        if not all(arch.isdigit() for arch in wanted.split(";")):
            raise Missing(f"SAGE_CUDA_ARCHS must be numbers like 80;90, got {wanted!r}", f"SAGE_CUDA_ARCHS='80;90' {REINSTALL}")
        return sorted(wanted.split(";"), key=int)  # the PTX for all newer ones is of the first
    known = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ARCHS if f"compute_{arch}" in known]
    if not archs:
        raise Missing(f"{path} knows none of sm_{', sm_'.join(ARCHS)}", f"install a newer CUDA toolkit, then SAGE_BUILD=cuda {REINSTALL}")
    return archs


def compile_cuda(path, release, archs, folder):
    """Objects of all CUDA sources, made again only where a source, a header or a flag is newer."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")
    command = [path, *NVCC, f"--threads={min(len(archs), os.cpu_count() or 1)}", *codes]
    os.makedirs(folder, exist_ok=True)
    stamp = os.path.join(folder, "nvcc.txt")
    made_by = f"{' '.join(command)}\nnvcc {release}"
    same = os.path.exists(stamp) and open(stamp).read() == made_by
    if not same and os.path.exists(stamp):
        os.remove(stamp)  # until all objects are of this command
    newest = max(os.path.getmtime(os.path.join(HERE, f)) for f in (*HEADERS, "setup.py"))
    objects = []
    for source in CUDA_SOURCES:
        made = os.path.join(folder, os.path.basename(source) + ".o")
        objects.append(made)
        changed = max(newest, os.path.getmtime(os.path.join(HERE, source)))
        if not (same and os.path.exists(made) and os.path.getmtime(made) > changed):
            say(f"nvcc {source} for {', '.join(f'sm_{a}' for a in archs)}")
            subprocess.run([*command, "-c", os.path.join(HERE, source), "-o", made + ".part"], check=True)
            os.replace(made + ".part", made)
    with open(stamp, "w") as file:
        file.write(made_by)
    return objects


def import_torch():
    """torch.utils.cpp_extension, from the environment which the package is being installed into."""
    site = sysconfig.get_paths()["purelib"]
    if site not in sys.path:
        sys.path.append(site)  # an isolated build hides it
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        reason = f"torch could not be imported when the package was built ({error})"
        raise Missing(reason, f"pip install torch setuptools ninja && {REINSTALL}") from error
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        raise Missing(f"torch {torch.__version__} is older than 2.10", f"pip install -U torch && {REINSTALL}")
    return torch, cpp_extension


class Record:
    """What this build made; written next to the modules it describes."""

    def __init__(self):
        self.facts = {
            "mode": MODE,
            "native": [],
            "reason": None,
            "mend": None,
            "torch": None,
            "compiler": None,
            "flags": None,
            "nvcc": None,
            "cuda_archs": [],
            "cuda_reason": "no native kernels were built",
            "grouping_reason": None,
            "version": runpy.run_path(os.path.join(HERE, "sage_kernels", "version.py"))["__version__"],
        }

    def left_out(self, reason, mend):
        say(f"no native kernels: {reason}. The package works without, slower. To get them: {mend}")
        self.facts.update(native=[], reason=reason, mend=mend, cuda_archs=[], cuda_reason="no native kernels were built")

    def write(self, folder):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "_build_info.json"), "w") as file:
            json.dump(self.facts, file, indent=2)


class BuildPurePython(build_py):
    """Adds the record of a build without native kernels."""

    def run(self):
        super().run()
        inside_tree = getattr(self, "editable_mode", False)
        RECORD.write(os.path.join(HERE if inside_tree else self.build_lib, "sage_kernels"))


def find_cuda(torch, record):
    """What `nvcc` returns if CUDA kernels are to be built, else None; the record keeps the reason."""
    reason = "SAGE_BUILD=cpu was asked for" if MODE == "cpu" else None
    if MODE == "auto" and torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    try:
        cuda = nvcc() if reason is None else None
    except Missing as missing:
        if MODE == "cuda":
            raise
        cuda, reason = None, missing.reason
    record.facts["cuda_reason"] = reason
    return cuda


def grouping_core(cpp_extension):
    """The extension of the grouping core; without pybind11 itself it takes the headers that come with torch."""
    try:
        import pybind11

        headers = [pybind11.get_include()]
    except ImportError:
        headers = cpp_extension.include_paths()
    return Extension(
        "sage_kernels._grouping",
        ["csrc/grouping/module.cpp"],
        include_dirs=headers,
        depends=HEADERS,
        language="c++",
        extra_compile_args={"cxx": GROUPING},
        extra_link_args=["-Wl,-s", "-pthread"] if sys.platform == "linux" else [],
    )


def native_build(record):
    """Arguments of setup() that build the extension. Raises Missing."""
    if MODE == "auto" and sysconfig.get_platform() != TESTED:
        reason = f"SAGE_BUILD=auto builds native kernels on {TESTED} only, and this is {sysconfig.get_platform()}"
        raise Missing(reason, f"SAGE_BUILD=cpu {REINSTALL}")
    version = compiler()
    torch, cpp_extension = import_torch()
    cuda, core = find_cuda(torch, record), grouping_core(cpp_extension)
    record.facts.update(torch=torch.__version__, compiler=version, flags=" ".join(COMPILE), native=["cpu", "grouping"])

    class BuildNative(cpp_extension.BuildExtension):
        """Compiles with ninja; in auto mode a failure leaves a pure-Python package behind."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # what was linked before may be of another mode; ninja still knows what is up to date

        def run(self):
            in_place = self.inplace or getattr(self, "editable_mode", False)
            super().run()
            record.write(os.path.join(HERE if in_place else self.build_lib, "sage_kernels"))

        def build_extensions(self):
            kernels, core = self.extensions
            try:
                if cuda:
                    self.add_cuda(kernels, *cuda)
                self.extensions = [kernels]
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                verbose = f"SAGE_BUILD=cpu pip install -v{REINSTALL.removeprefix('pip install')}"
                record.left_out(f"compiling failed ({type(error).__name__}: {str(error)[:200]})", verbose)
                self.extensions = []
            else:
                self.add_core(core)

        def add_core(self, core):
            """Builds the grouping core; in auto mode a failure leaves the kernels alone."""
            kernels, self.extensions = self.extensions, [core]
            try:
                super().build_extensions()
                self.extensions = [*kernels, core]
            except Exception as error:
                if MODE != "auto":
                    raise
                record.facts["native"].remove("grouping")
                record.facts["grouping_reason"] = f"compiling it failed ({type(error).__name__}: {str(error)[-200:]})"
                say(f"no grouping core, it will run in Python, slower: {record.facts['grouping_reason']}")
                self.extensions = kernels

        def add_cuda(self, extension, path, release, runtime, archs):
            """Adds the CUDA kernels; in auto mode a failure leaves the C++ kernels alone."""
            try:
                objects = compile_cuda(path, release, archs, os.path.join(os.path.abspath(self.build_temp), "cuda"))
            except (OSError, subprocess.CalledProcessError) as error:
                if MODE != "auto":
                    raise
                record.facts["cuda_reason"] = f"nvcc failed ({str(error)[-200:]})"
                return say(f"no CUDA kernels: {record.facts['cuda_reason']}")
            extension.extra_objects += objects
            extension.library_dirs.append(runtime)
            extension.libraries += CUDART
            extension.extra_compile_args["cxx"] = [*COMPILE, "-DSAGE_CUDA"]
            record.facts["native"].append("cuda")
            record.facts.update(nvcc=release, cuda_archs=archs)

    extension = cpp_extension.CppExtension(
        "sage_kernels._C",
        SOURCES,
        include_dirs=[os.path.join(HERE, "csrc")],
        depends=HEADERS,
        extra_compile_args={"cxx": COMPILE},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    kinds = f"C++ and CUDA kernels, nvcc {cuda[1]}" if cuda else f"C++ kernels (no CUDA kernels: {record.facts['cuda_reason']})"
    say(f"SAGE_BUILD={MODE}: {kinds}, torch {torch.__version__}, {version}")
    return {
        "ext_modules": [extension, core],
        "cmdclass": {"build_ext": BuildNative},
    }


def arguments():
    if MODE not in MODES:
        sys.exit(f"SAGE_BUILD must be one of {', '.join(MODES)}; got {MODE!r}")
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}  # these only read metadata
    try:
        if MODE != "none":
            return native_build(RECORD)
        RECORD.left_out("SAGE_BUILD=none was asked for", REINSTALL)
    except Missing as missing:
        if MODE != "auto":
            sys.exit(f"[sage] {missing}")
        RECORD.left_out(missing.reason, missing.mend)
    return {"cmdclass": {"build_py": BuildPurePython}}


RECORD = Record()
setup(**arguments())
