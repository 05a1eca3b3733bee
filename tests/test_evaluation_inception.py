"""FID's Inception-v3: the network, clean-fid's preparation, and that nothing is unpickled without consent."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sage.evaluation import convert_inception, distance_name, inception, load_extractor
from sage.evaluation.features import Extractor

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth(size, low=0, high=255, seed=0):
    """uint8 [3, size, size], smooth enough to survive resizing, between two levels."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * (high - low) + low).round().byte()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights with statistics that let a signal through, as a file that nobody vouches for."""
    file = tmp_path_factory.mktemp("models") / "inception.safetensors"
    torch.manual_seed(2)
    model = inception.InceptionV3()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.05, 0.2)
    save_file(model.state_dict(), file)
    return file


def test_inception_has_the_published_networks_parameters():
    state = inception.InceptionV3().state_dict()
    assert sum(value.numel() for key, value in state.items() if "running" not in key and "tracked" not in key) == 21_785_568
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_6c.branch7x7dbl_2.bn.running_var"].shape == (160,)


def test_inception_is_torch_fidelitys():
    """Bit for bit; where torch-fidelity (and with it torchvision) is not installed, this is skipped."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(6)
    ours = inception.InceptionV3().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        model = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    model.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.float()), model(x)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [20, 400])
def test_clean_resize_is_pils_without_its_rounding(size):
    """Away from 0 and 255, where nothing is cut, PIL's resizing of 8-bit pictures differs by rounding, once per axis: ½ · 1.25 + ½."""
    picture = smooth(size, 80, 170)
    resized = inception.clean_resize(picture)
    rounded = np.array(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC))
    rounded = torch.from_numpy(rounded).permute(2, 0, 1)
    assert resized.shape == (3, 299, 299) and resized.dtype == torch.float32
    assert 0.1 < (resized - rounded).abs().mean() and (resized - rounded).abs().max() < 1.15


def test_clean_resize_widens_the_filter_and_cuts_what_swings_over():
    checks = (torch.arange(600)[:, None] + torch.arange(600)) % 2 * 255  # finer than 299 pixels can show
    resized = inception.clean_resize(checks.byte().expand(3, 600, 600))
    assert (resized[:, 5:-5, 5:-5] - 127.5).abs().max() < 8
    edge = torch.zeros(3, 40, 40, dtype=torch.uint8)
    edge[:, :, 20:] = 255
    assert (inception.clean_resize(edge).min(), inception.clean_resize(edge).max()) == (0, 255)
    assert torch.equal(inception.clean_resize(smooth(299)), smooth(299).float())


def test_inception_features(inception_file):
    extractor = load_extractor(f"inception:{inception_file}")
    images = [smooth(50, seed=k) for k in range(3)]
    features = extractor.image_features(images, batch=2)
    assert features.shape == (3, 2048) and features.isfinite().all() and features.std(0).mean() > 0 and isinstance(extractor, Extractor)
    model, published = inception.load_inception(inception_file)
    with torch.no_grad():
        torch.testing.assert_close(model(inception.clean_resize(images[1])[None])[0], features[1], rtol=1e-4, atol=1e-6)
    assert not published and extractor.name == "Inception-v3, weights of unknown origin"


def test_inception_refuses_other_weights(tmp_path, inception_file):
    file = tmp_path / "other.safetensors"
    save_file({key: value for key, value in load_file(inception_file).items() if "Mixed_7b.branch1x1" not in key}, file)
    with pytest.raises(ValueError, match="5 of 470 tensors are missing or of another shape, the first is 'Mixed_7b.branch1x1"):
        load_extractor(f"inception:{file}")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_extractor("inception:no-such.safetensors")
    file.write_bytes(b"nonsense")
    with pytest.raises(RuntimeError, match="cannot read .* as safetensors"):
        load_extractor(f"inception:{file}")


def test_inception_unpickles_with_consent_only(tmp_path, inception_file, monkeypatch):
    pickle = tmp_path / "weights.pth"
    torch.save(load_file(inception_file) | {"fc.weight": torch.zeros(2, 2)}, pickle)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("unpickled"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: pytest.fail("downloaded"))
    with pytest.raises(RuntimeError, match="'weights.pth' is a pickle.*convert_inception.*allow_pickle=True"):
        load_extractor(f"inception:{pickle}")
    with pytest.raises(RuntimeError, match="no file was given, and the published weights are a pickle"):
        load_extractor("inception")
    with pytest.raises(RuntimeError, match="local_files_only rules out a download"):
        load_extractor("inception", allow_pickle=True, local_files_only=True)
    with pytest.raises(RuntimeError, match="is a pickle"):
        convert_inception(pickle, tmp_path / "out.safetensors")


def test_inceptions_weights_are_converted_with_their_origin(tmp_path, inception_file, monkeypatch):
    pickle, file = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    torch.save(load_file(inception_file), pickle)
    convert_inception(pickle, file, allow_pickle=True)
    origin = hashlib.sha256(pickle.read_bytes()).hexdigest()
    tensors, recorded = inception.read_weights(file)
    assert recorded == origin and all(torch.equal(tensors[key], value) for key, value in load_file(inception_file).items())
    assert load_extractor(f"inception:{file}").name.endswith("of unknown origin")  # it is not the published file's
    assert distance_name("frechet", load_extractor(f"inception:{pickle}", allow_pickle=True)).startswith("Fréchet distance (")
    monkeypatch.setattr(inception, "PUBLISHED", origin[:8])
    assert distance_name("frechet", load_extractor(f"inception:{file}")) == "FID"
    with pytest.raises(ValueError, match=r"target must end in .safetensors"):
        convert_inception(pickle, tmp_path / "out.bin", allow_pickle=True)


def test_a_pickle_that_runs_code_runs_none_even_with_consent(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="cannot read 'evil.pth' as weights"):
        load_extractor(f"inception:{tmp_path / 'evil.pth'}", allow_pickle=True)


def test_a_download_is_kept_and_checked(tmp_path, monkeypatch, inception_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save(load_file(inception_file), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        extractor = load_extractor("inception", allow_pickle=True)
    assert asked == [(inception.URL, "6726825d")] and "unknown origin" in extractor.name  # a file in the folder is hashed anew

    def fail(*args, **options):
        raise OSError("no network")

    (tmp_path / "checkpoints" / inception.URL.rsplit("/", 1)[1]).unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError, match="cannot download .*no network.*bring the file here"):
        load_extractor("inception", allow_pickle=True)
