"""The CUDA kernels without a GPU: what nvcc makes of them for every architecture, and that the library with them loads anywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import cuobjdump

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90", "100", "120")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__", "tests", "weights")
# Registers of a kernel at most; 65,536 shared by the threads of a multiprocessor make three blocks of 256 at 80, two at 128.
CEILINGS = {"branch_step plain": 80, "branch_step": 128, "backward": 80, "normals": 40, "group_mean": 64}
pytestmark = pytest.mark.deep


def test_the_documentation_names_the_ceilings():
    """docs/kernels.md shows the numbers that the tests hold the kernels to."""
    block = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("<!-- ceilings -->")[1].split("<!-- /ceilings -->")[0]
    shown = re.findall(r"^\| `(\w+)`(, without noise and corrector)? \| (\d+) \|$", block, re.MULTILINE)
    kinds = {"branch_step_backward": "backward"}
    assert {kinds.get(name, name) + " plain" * bool(plain): int(n) for name, plain, n in shown} == CEILINGS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tree in which a wheel with CUDA kernels was built; compiled once for all tests here."""
    if shutil.which("nvcc") is None or shutil.which("c++") is None:
        pytest.skip("no nvcc or no C++ compiler")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if not {f"compute_{arch}" for arch in ARCHS} <= set(known):
        pytest.skip(f"this nvcc does not know all of sm_{', sm_'.join(ARCHS)}")
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SAGE_CUDA_ARCHS")} | {"SAGE_BUILD": "cuda"}
    run = subprocess.run([sys.executable, "setup.py", "bdist_wheel"], cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tree


@pytest.fixture(scope="module")
def objects(built):
    made = {path.name.removesuffix("_cuda.cu.o"): path for path in built.glob("build/temp*/cuda/*.o")}
    assert set(made) == {"branch_step", "branch_step_backward", "normals", "group_mean"}
    return made


def label(function):
    """("branch_step plain", "bf16-f32 aligned") of a mangled kernel name."""
    kernel = re.search(r"(branch_step|backward|normals|group_mean)_kernel(?:I(.*?)EE?v|ILb)", function)
    arguments = function[kernel.start(1) :]
    types = re.findall(r"__nv_bfloat16|__half|(?<=I)f|(?<=I)d|f(?=L)", arguments.split("EEv")[0])
    switches = re.findall(r"Lb([01])E", arguments)
    kind = kernel[1]
    if kind == "branch_step" and switches[1:] == ["0", "0"]:
        kind = "branch_step plain"
    return kind, types, switches, int((re.findall(r"Li(\d+)E", arguments) or [4])[0])


def resources(path, arch):
    """{mangled kernel: {"REG": registers, "STACK": bytes, "LOCAL": bytes}}"""
    command = [cuobjdump(), "--dump-resource-usage", "-arch", f"sm_{arch}", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+(.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)} for name, usage in found}


def instructions(path, arch):
    """{mangled kernel: Counter of instructions}"""
    text = subprocess.run([cuobjdump(), "--dump-sass", "-arch", f"sm_{arch}", path], capture_output=True, text=True, check=True).stdout
    code = {}
    for part in text.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        code[name.strip()] = Counter(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", body))
    return code


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_and_registers_leave_room_for_blocks(objects, arch):
    seen = Counter()
    for path in objects.values():
        for function, used in resources(path, arch).items():
            kind = label(function)[0]
            seen[kind] += 1
            assert used["STACK"] == 0 and used["LOCAL"] == 0, (function, used)
            assert used["REG"] <= CEILINGS[kind], (function, used)
    assert seen == {"branch_step plain": 5, "branch_step": 20, "backward": 10, "normals": 2, "group_mean": 8}


@pytest.mark.parametrize("arch", ARCHS)
def test_aligned_rows_move_in_16_bytes_and_nothing_goes_through_local_memory(objects, arch):
    for name, path in objects.items():
        for function, code in instructions(path, arch).items():
            kind, types, switches, width = label(function)
            wide = [op for op in code if re.match(r"(LDG|STG)\.E.*\.128", op)]
            assert not [op for op in code if op.startswith(("LDL", "STL"))], function
            if kind.startswith("branch_step"):
                vector = switches[0] == "1"
            elif kind == "backward":
                vector = switches[0] == "1" and types[-1:] == ["f"]  # four elements: 8 bytes of a 2-byte type
            elif kind == "group_mean":
                vector = width > 1
            else:
                vector = switches[0] == "1"
            if vector:
                assert any(op.startswith("STG") for op in wide), (function, code)
                assert kind == "normals" or any(op.startswith("LDG") for op in wide), (function, code)


def fused(code):
    return sum(n for op, n in code.items() if op.startswith(("FFMA", "HFMA2.BF16.FMA")))


@pytest.mark.parametrize("arch", ARCHS)
def test_products_and_sums_are_never_fused(objects, arch):
    """A correctly rounded square root is made of fused operations: noise has as many as its roots need, all else none."""
    noise = [fused(code) for code in instructions(objects["normals"], arch).values()]
    assert max(noise) == min(noise) > 0
    for name in ("branch_step", "branch_step_backward"):
        for function, code in instructions(objects[name], arch).items():
            seeded = label(function)[0] != "backward" and label(function)[2][1] == "1"
            assert fused(code) <= (4 * noise[0] if seeded else 0), function


def test_the_kernels_know_nothing_of_torch(objects):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    for path in objects.values():
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"torch|c10|\bat::", symbols)


def test_the_library_with_cuda_kernels_loads_on_a_torch_without(built, tmp_path):
    (wheel,) = built.glob("dist/*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    facts = json.loads((site / "sage_kernels" / "_build_info.json").read_text())
    assert facts["native"] == ["cpu", "grouping", "cuda"] and facts["cuda_archs"] == list(ARCHS) and facts["cuda_reason"] is None and facts["nvcc"]
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]  # of a development install
import torch, sage_kernels
from sage_kernels.testing import random_case, same_bits
print(sage_kernels.__file__)
print(sage_kernels.backends.available()["cpu"], "|", sage_kernels.backends.available()["cuda"])
positional, keyword = random_case(torch.Generator().manual_seed(0), 3, 4, (20,))
results = [sage_kernels.branch_step(*positional, **keyword, backend=b).sample for b in ("cpu", "reference")]
print(same_bits(*results))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", code], cwd=site, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, available, equal = run.stdout.strip().split("\n")
    assert Path(file).is_relative_to(site) and equal == "True"
    assert re.fullmatch(r"None \| (None|torch .* is built without CUDA or ROCm|torch finds no GPU here|built for sm_80 .*)", available)


def build(tree, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_OUT)
    return tmp_path / "tree"


def facts(tree):
    (path,) = tree.glob("build/lib*/sage_kernels/_build_info.json")
    return json.loads(path.read_text())


def a_fake_nvcc(folder, *, archs, fails):
    """A compiler that says what a script tells it to; the runtime library is an empty file."""
    (folder / "libcudart_static.a").touch()
    script = f"""#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 12.4, V12.4.99";;
*--dryrun*) echo '#$ LIBRARIES=  "-L{folder}"' >&2;;
*--list-gpu-arch*) echo "{" ".join(f"compute_{a}" for a in archs)}";;
*) echo "$*" >> {folder}/asked.txt
   for word; do [ "$before" = -o ] && echo made > "$word"; before="$word"; done
   exit {int(fails)};;
esac
"""
    (folder / "nvcc").write_text(script)
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


WITH_CUDA_TORCH = "import torch; torch.version.cuda = '12.4'\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_auto_keeps_the_cpp_kernels_when_nvcc_fails(tree, tmp_path):
    """And asks an older nvcc only for the architectures that it knows."""
    (tree / "setup.py").write_text(WITH_CUDA_TORCH + (tree / "setup.py").read_text())
    run = build(tree, SAGE_BUILD="auto", CUDACXX=a_fake_nvcc(tmp_path, archs=("75", "80", "90"), fails=True))
    assert run.returncode == 0, run.stderr
    made = facts(tree)
    assert made["native"] == ["cpu", "grouping"] and made["cuda_reason"].startswith("nvcc failed") and made["cuda_archs"] == []
    assert "no CUDA kernels: nvcc failed" in run.stderr and "-DSAGE_CUDA" not in made["flags"]
    asked = (tmp_path / "asked.txt").read_text()
    assert "code=sm_80" in asked and "code=sm_90" in asked and "sm_100" not in asked
    assert list(tree.glob("build/lib*/sage_kernels/_C*.so"))


def test_objects_of_another_command_are_never_linked(tree, tmp_path):
    """Not even those that a build which failed half-way has left."""
    for source in tree.glob("csrc/**/*.cpp"):
        source.write_text("#error stop here\n")
    good = {"SAGE_BUILD": "cuda", "CUDACXX": a_fake_nvcc(tmp_path, archs=("80", "90"), fails=False)}
    asked = tmp_path / "asked.txt"
    build(tree, **good)
    assert len(asked.read_text().splitlines()) == 4
    build(tree, **good)
    assert len(asked.read_text().splitlines()) == 4
    a_fake_nvcc(tmp_path, archs=("80", "90"), fails=True)
    build(tree, **good, SAGE_CUDA_ARCHS="90")
    a_fake_nvcc(tmp_path, archs=("80", "90"), fails=False)
    asked.unlink()
    build(tree, **good)
    assert len(asked.read_text().splitlines()) == 4 and "sm_80" in asked.read_text()


def test_architectures_can_be_chosen(tree, tmp_path):
    run = build(tree, SAGE_BUILD="cuda", SAGE_CUDA_ARCHS="89", CUDACXX=a_fake_nvcc(tmp_path, archs=("80",), fails=True))
    assert run.returncode != 0
    assert "-gencode=arch=compute_89,code=sm_89 -gencode=arch=compute_89,code=compute_89" in (tmp_path / "asked.txt").read_text()


@pytest.mark.parametrize(
    ("variables", "archs", "message"),
    [
        ({"SAGE_CUDA_ARCHS": "ninety"}, ("80",), "SAGE_CUDA_ARCHS must be numbers like 80;90, got 'ninety'"),
        ({}, ("50", "60"), "knows none of sm_80, sm_90, sm_100, sm_120. To mend it: install a newer CUDA toolkit"),
    ],
)
def test_architectures_that_cannot_be_are_refused(tree, tmp_path, variables, archs, message):
    variables = {"SAGE_BUILD": "cuda", "CUDACXX": a_fake_nvcc(tmp_path, archs=archs, fails=False)} | variables
    run = build(tree, **variables)
    assert run.returncode != 0 and message in run.stderr
