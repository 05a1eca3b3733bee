"""Open text for the text encoder's distillation: emoji names, WordNet, and prompts composed from our own word lists.

Nothing here is a prompt set that anything is evaluated on. WordNet brings the breadth (definitions, example
sentences, the names of things), the composed prompts bring the register: styles, subjects, doings, places.
"""

import random
import re
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
_ANIMAL, _ARTIFACT, _BODY, _FOOD, _LOCATION, _OBJECT, _PERSON, _PLANT = 5, 6, 8, 13, 15, 17, 18, 20
_CONCRETE = {_ANIMAL, _ARTIFACT, _BODY, _FOOD, _LOCATION, _OBJECT, _PERSON, _PLANT}

SUBJECTS = """cat|dog|puppy|kitten|horse|cow|sheep|goat|pig|hen|rooster|duck|goose|owl|eagle|parrot|penguin|flamingo|
swan|robin|crow|fox|wolf|bear|panda|koala|kangaroo|lion|tiger|leopard|elephant|giraffe|zebra|rhino|hippo|camel|monkey|
gorilla|squirrel|rabbit|hedgehog|raccoon|deer|moose|beaver|otter|seal|whale|dolphin|shark|octopus|squid|crab|lobster|
goldfish|frog|turtle|snake|lizard|crocodile|dinosaur|dragon|unicorn|robot|alien|astronaut|wizard|witch|knight|king|
queen|princess|pirate|ninja|samurai|soldier|farmer|chef|doctor|nurse|teacher|student|scientist|painter|musician|
dancer|firefighter|policeman|detective|baby|child|boy|girl|man|woman|old man|old woman|grandmother|couple|family|
crowd|ghost|skeleton|zombie|vampire|angel|fairy|mermaid|statue|snowman|scarecrow|apple|orange|banana|pear|peach|
cherry|strawberry|blueberry|grape|lemon|lime|pineapple|mango|watermelon|kiwi|tomato|carrot|potato|onion|pumpkin|
cucumber|pepper|mushroom|broccoli|cabbage|bread|cheese|egg|sandwich|burger|pizza|taco|sushi|noodle soup|salad|steak|
cake|pie|cookie|doughnut|ice cream|chocolate|candy|coffee|cup of tea|glass of wine|glass of beer|bottle of milk|car|
sports car|truck|bus|taxi|train|tram|subway|bicycle|motorcycle|scooter|tractor|ambulance|fire engine|airplane|
helicopter|rocket|spaceship|hot air balloon|boat|sailing boat|ship|submarine|canoe|house|cottage|castle|tower|bridge|
church|temple|mosque|lighthouse|windmill|skyscraper|barn|tent|shop|restaurant|library|school|hospital|station|
factory|stadium|park bench|fountain|street lamp|traffic light|stop sign|mailbox|fence|gate|door|window|staircase|
chair|table|sofa|bed|lamp|mirror|clock|bookshelf|piano|guitar|violin|drum|trumpet|saxophone|book|newspaper|pencil|
scissors|key|lock|umbrella|hat|shoe|boot|dress|shirt|tie|coat|backpack|suitcase|camera|phone|laptop|computer|
television|radio|microphone|headphones|light bulb|candle|balloon|kite|teddy bear|doll|ball|football|basketball|
tennis racket|skateboard|snowboard|surfboard|chess board|trophy|crown|ring|diamond|sword|shield|bow and arrow|anchor|
map|globe|compass|telescope|microscope|tree|oak tree|pine tree|palm tree|cactus|flower|rose|tulip|sunflower|daisy|
leaf|forest|mountain|volcano|hill|valley|canyon|cliff|cave|island|beach|ocean|sea|wave|lake|river|waterfall|desert|
meadow|garden|sky|cloud|rainbow|storm|lightning|snowflake|sun|moon|star|planet|galaxy|comet|city skyline|village|
street|road|market|kitchen|bedroom|bathroom|living room|office|classroom|red cube|blue sphere|green triangle|circle|
square|heart|arrow|flag|logo|poster|sign|map of the world|maze|painting|sculpture"""
ADJECTIVES = """red|blue|green|yellow|orange|purple|pink|brown|black|white|grey|golden|silver|dark|bright|pale|
colorful|transparent|shiny|rusty|wooden|metal|glass|stone|paper|plastic|leather|woolen|big|large|huge|giant|small|tiny|
tall|short|long|thin|thick|fat|round|square|old|ancient|new|modern|futuristic|young|beautiful|ugly|cute|scary|funny|
happy|sad|angry|surprised|sleepy|tired|bored|proud|shy|brave|hungry|wet|dry|dirty|clean|broken|empty|full|open|closed|
frozen|burning|melting|floating|flying|sleeping|smiling|laughing|crying|striped|spotted|fluffy|smooth|sharp|heavy|
fresh|rotten|sweet|delicious|expensive|cheap|royal|magical|mysterious|abandoned|crowded|quiet|snowy|sunny|rainy|foggy"""
STYLES = """a photo of|a photograph of|a close-up photo of|a high resolution photo of|a blurry photo of|a black and white
photo of|a portrait of|a portrait photo of|an aerial view of|a wide shot of|a macro photo of|a studio shot of|a
screenshot of|an oil painting of|a watercolor painting of|an acrylic painting of|an abstract painting of|a cubist
painting of|an impressionist painting of|a surrealist painting of|a charcoal drawing of|a pencil sketch of|an ink
drawing of|a line drawing of|a child's drawing of|a chalk drawing of|a cartoon of|a comic book panel of|an anime
picture of|a pixel art picture of|a vector illustration of|an illustration of|a children's book illustration of|a
concept art of|a digital rendering of|a 3d rendering of|a low poly rendering of|a sculpture of|a marble statue of|a
bronze statue of|a wood carving of|a paper cutout of|an origami|a mosaic of|a stained glass window of|a tapestry of|an
embroidery of|a woodblock print of|a poster of|a logo of|an icon of|an emoji of|a sticker of|a postage stamp of|a tattoo
of|graffiti of|a map of|a diagram of|a blueprint of|a cross-section of|a stuffed toy of|a view of|a painting of|a
picture of|an image of|a drawing of|a scene with|an old photograph of|an infrared photo of|a night photo of"""
PLACES = """on a table|on a wooden table|on a white plate|on the floor|on a red carpet|on a chair|on a bed|on a shelf|
in a kitchen|in a bedroom|in an office|in a classroom|in a museum|in a library|in a restaurant|in a garden|in a park|in a
forest|in a field of flowers|in a desert|in the jungle|in the mountains|in the snow|in the rain|in the fog|in the city|in
a village|in a street|at the market|at the beach|by the sea|by a lake|by the river|near a waterfall|on an island|on a hill|
on the moon|on mars|in space|among the stars|in the sky|above the clouds|under water|under a tree|under a bridge|behind a
fence|in front of a house|in front of a castle|in front of a mountain|in front of a blue wall|next to a road|on a boat|on a
train|in a car|on the grass|at night|at sunset|at sunrise|during a thunderstorm|in autumn|in winter|in spring|in summer|
against a white background|on a black background|with mountains in the background|in a dark room|in an empty room|in New
York|in Paris|in London|in Tokyo|in Venice|in Egypt|in ancient Rome|in front of the Eiffel tower|near the Grand Canyon"""
DOINGS = """sitting|standing|running|walking|sleeping|jumping|flying|swimming|dancing|singing|reading a book|writing a
letter|eating an apple|eating pizza|drinking coffee|drinking tea|cooking dinner|playing the guitar|playing the piano|
playing chess|playing football|riding a bicycle|riding a horse|riding a motorcycle|driving a car|flying a kite|holding a
sign|holding an umbrella|holding a balloon|holding a sword|holding flowers|carrying a basket|pulling a cart|climbing a
tree|climbing a mountain|looking at the moon|looking at a painting|looking out of a window|looking into a mirror|talking
on the phone|using a laptop|taking a picture|painting a wall|building a house|planting a tree|washing the dishes|fishing|
skiing|surfing|skateboarding|fighting a dragon|chasing a ball|waving a flag|smiling at the camera|wearing a hat|wearing
a red hat|wearing sunglasses|wearing a suit and tie|wearing a crown|wearing a helmet|wearing a blue dress|wearing a
scarf|wearing a leather jacket|wearing a space suit|wearing headphones|wearing a backpack"""
RELATIONS = """and|and|next to|on top of|under|behind|in front of|to the left of|to the right of|inside|above|below|near|
looking at|with|without|holding|made of|in the shape of|bigger than|surrounded by|covered with|chasing|painted on|
reflected in|hanging from|between two rocks and|instead of|filled with"""
COUNTS = "two|three|four|five|six|seven|ten|a dozen|many|several|a few|a pair of|a pile of|a row of|a group of|no"
MATERIALS = """wood|stone|glass|gold|silver|bronze|paper|cardboard|plastic|clay|ice|snow|sand|fire|water|smoke|leaves|
flowers|vegetables|fruit|cheese|chocolate|candy|bread|wool|feathers|metal|crystal|marble|bricks|books|clouds|light"""
ENDINGS = """4k|highly detailed|soft light|dramatic lighting|golden hour|long exposure|shallow depth of field|bokeh|wide
angle|in the style of a fairy tale|in the style of an old master|in pastel colors|in bright colors|in neon colors|black and
white|minimalist|symmetrical|from above|from below|seen from behind|seen from the side|front view|isometric|vintage|retro|
steampunk|cyberpunk|gothic|art deco|art nouveau|baroque|renaissance|pop art|concept art|cinematic|foggy morning|blue sky|
full moon|with a wooden frame|with text below|on a sunny day|on a rainy day"""
WORDS = """hello|welcome|love|peace|stop|go|open|closed|yes|no|thank you|good night|happy birthday|for sale|exit|danger|
start|the end|home|free|hope|dream|time|music|art|new|left|right|wow|help"""


def _items(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", item).strip() for item in text.split("|")]


def wordnet(folder: Path = WORDNET) -> tuple[list[str], list[str], list[str]]:
    """(definitions, example sentences, names of concrete things), in file order, without repetition."""
    if not (folder / "data.noun").is_file():
        raise RuntimeError(f"wordnet: wanted WordNet's data files, found none in {folder}; "
                           "install them (Debian: apt-get install wordnet-base) or pass --wordnet DIR")
    definitions, examples, names = [], [], []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            examples += [x for x in re.findall(r'"([^"]+)"', gloss) if " " in x]
            definitions.append(re.sub(r'"[^"]*"', "", gloss).strip(" ;"))
            if part == "noun" and int(fields[1]) in _CONCRETE:
                lemmas = fields[4:4 + 2 * int(fields[3], 16):2]
                names += [lemma.replace("_", " ") for lemma in lemmas[:2]]
    unique = lambda items: list(dict.fromkeys(x for x in items if x))
    return unique(definitions), unique(examples), unique(names)


def _article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def compose(count: int, names: list[str], seed: int) -> list[str]:
    """Composes `count` prompts, from a bare noun to thirty words.

    Args: names (list[str]): further subjects beside our own, drawn one time in three.
    """
    rng = random.Random(seed)
    lists = [_items(x) for x in (SUBJECTS, ADJECTIVES, STYLES, PLACES, DOINGS, RELATIONS, COUNTS, MATERIALS, ENDINGS, WORDS)]
    subjects, adjectives, styles, places, doings, relations, counts, materials, endings, words = lists
    pick = rng.choice

    def noun() -> str:
        plain = pick(names) if rng.random() < 0.33 else pick(subjects)
        return f"{pick(adjectives)} {plain}" if rng.random() < 0.4 else plain

    def thing() -> str:
        roll = rng.random()
        if roll < 0.62:
            return _article(noun())
        if roll < 0.74:
            return f"the {noun()}"
        if roll < 0.88:
            return f"{pick(counts)} {_plural(noun())}"
        return f"{_article(noun())} with {_article(noun())}"

    patterns = (
        (1, lambda: noun()),
        (2, lambda: thing()),
        (2, lambda: f"{thing()} {pick(doings)}"),
        (2, lambda: f"{thing()} {pick(places)}"),
        (3, lambda: f"{thing()} {pick(doings)} {pick(places)}"),
        (2, lambda: f"{thing()} {pick(relations)} {thing()}"),
        (1, lambda: f"{_article(noun())} made of {pick(materials)}"),
        (2, lambda: f"{pick(styles)} {thing()}"),
        (2, lambda: f"{pick(styles)} {thing()} {pick(places)}"),
        (3, lambda: f"{pick(styles)} {thing()} {pick(doings)} {pick(places)}"),
        (2, lambda: f"{pick(styles)} {thing()} {pick(relations)} {thing()} {pick(places)}"),
        (2, lambda: f"{pick(styles)} {thing()} {pick(doings)} and {pick(doings)} {pick(places)}. {pick(endings)}"),
        (2, lambda: f"{thing()} {pick(relations)} {thing()}, {pick(endings)}, {pick(endings)}"),
        (1, lambda: f"{pick(styles)} {thing()} {pick(doings)}, {thing()} {pick(places)} and {thing()} {pick(places)}"),
        (1, lambda: f"the word '{pick(words)}' written on {thing()} {pick(places)}"),
        (1, lambda: f"{thing()} holding a sign that says \"{pick(words)}\" {pick(places)}"),
    )
    makers = [maker for weight, maker in patterns for _ in range(weight)]
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[pick(makers)()] = None
    return list(prompts)


def gather(captions: list[str], folder: Path, *, definitions: int, examples: int, names: int, prompts: int,
           seed: int) -> list[str]:
    """The whole corpus, shuffled, without repetition; the counts are upper bounds per source."""
    rng = random.Random(seed)
    all_definitions, all_examples, all_names = wordnet(folder)
    take = lambda items, n: rng.sample(items, min(n, len(items)))
    texts = (list(captions) + take(all_definitions, definitions) + take(all_examples, examples)
             + take(all_names, names) + compose(prompts, all_names, seed))
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return texts
