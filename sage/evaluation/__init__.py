"""How good pictures are, and how much they lose by sharing: distances, matching of text, diversity, and how certain all of it is.

    extractor = sage.evaluation.load_extractor("emoji")
    drawn, real = extractor.image_features(images), extractor.image_features(pictures)
    print(distance_name("frechet", extractor), frechet_distance(drawn, real), "of which", floor(real, frechet_distance, size=len(drawn)))

    found = identification(extractor.embed_images(images), extractor.embed_texts(prompts), groups)
    print(interval(found.right, found.groups), "by chance", found.chance)

Importing this loads torch and no more; the packages behind an extractor are loaded with it. Weights are read from safetensors alone,
unless a function is told `allow_pickle=True`.
"""

from sage.evaluation.bootstrap import Estimate, interval, paired_interval
from sage.evaluation.distances import (
    Spread,
    cmmd,
    floor,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    kernel_distance_subsets,
)
from sage.evaluation.diversity import (
    Copies,
    Distance,
    PerGroup,
    copies,
    distance_to,
    lpips_distance,
    pairwise_distance,
    vendi_score,
    vendi_within,
)
from sage.evaluation.features import Extractor, distance_name, load_extractor
from sage.evaluation.inception import convert_inception
from sage.evaluation.matching import Identification, clip_score, clip_scores, identification

__all__ = [
    "Copies",
    "Distance",
    "Estimate",
    "Extractor",
    "Identification",
    "PerGroup",
    "Spread",
    "clip_score",
    "clip_scores",
    "cmmd",
    "convert_inception",
    "copies",
    "distance_name",
    "distance_to",
    "floor",
    "frechet_distance",
    "frechet_from_moments",
    "identification",
    "interval",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_extractor",
    "lpips_distance",
    "paired_interval",
    "pairwise_distance",
    "vendi_score",
    "vendi_within",
]
