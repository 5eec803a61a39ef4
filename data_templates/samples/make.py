"""Write the sample data of the quickstart: three small tasks with train and test rows.

Every word list and every phrasing below was written by hand for this project. The script only
combines them, with no randomness besides a seeded hash for the order of rows, so it gives the
same bytes on every machine and Python version.

    python data_templates/samples/make.py            rewrite the files
    python data_templates/samples/make.py --check    exit 1 if a file differs

The two splits share no entity and no wording, within a task and across the three tasks: a model
trained on all of `train` has met nothing that `test` asks about.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = "mtl-lora samples 1"
SPLITS = ("train", "test")
GRADES = ("irrelevant", "partial", "relevant")

Row = dict[str, str | list[str]]


@dataclass(frozen=True)
class Example:
    """One row, with what it was made from (for checks; not written to the file)."""

    row: Row
    label: str
    wordings: tuple[str, ...]
    entities: tuple[str, ...]


# --------------------------------------------------------------------------- task 1: animals

ANIMALS: dict[str, str] = {
    "train": """
trout salmon herring mackerel haddock halibut carp anchovy sardine cod shark eel
beetle wasp mosquito ant moth grasshopper cockroach termite dragonfly bee flea cricket
horse elephant rabbit wolf squirrel giraffe deer bear camel lion tiger zebra donkey hamster
hedgehog weasel dog cat pig whale seal walrus bison moose hyena lemur sloth armadillo porcupine
mole badger baboon chimpanzee koala wombat
lizard crocodile frog toad iguana chameleon cobra python
sparrow robin owl pigeon swan duck goose rooster hen pelican flamingo woodpecker hummingbird
canary peacock seagull heron stork magpie
scorpion centipede crab lobster squid snail slug worm
hare bull cockerel tadpole bumblebee minnow marlin guppy vole shrew gnat weevil swallow wren
swift ibis ape dingo caribou narwhal cormorant gander hound vixen macaw hornbill
""",
    "test": """
kangaroo monkey gorilla leopard rhinoceros goat sheep cow otter beaver dolphin buffalo panda
cheetah panther fox raccoon skunk antelope gazelle llama alpaca reindeer elk boar ferret meerkat
mongoose hippopotamus orangutan coyote jackal lynx cougar chipmunk gopher rat mouse yak warthog
bobcat pony stallion ram ewe spaniel manatee platypus opossum anteater
eagle falcon crow penguin parrot ostrich vulture raven hawk finch nightingale cuckoo kingfisher
albatross toucan condor quail pheasant partridge dove lark starling cockatoo
snake turtle tortoise alligator gecko viper rattlesnake salamander newt
butterfly spider ladybug hornet wallaby locust mantis
octopus shrimp tuna swordfish catfish stingray piranha barracuda sturgeon prawn crayfish
""",
}
# Plants, foods, things, buildings and places: nothing here is an animal in any reading.
OTHERS: dict[str, str] = {
    "train": """
oak maple birch willow spruce poplar cedar larch elm sycamore
violin cello clarinet flute trombone harp banjo accordion trumpet oboe
wrench chisel hacksaw crowbar spanner mallet hammer screwdriver ladder nail
banana mango cherry peach pear plum apricot papaya pineapple strawberry
tram tractor motorcycle taxi truck van minibus scooter bus ambulance
armchair stool bench dresser cupboard sofa bookcase sideboard wardrobe desk
castle barn cottage warehouse skyscraper palace chapel hotel factory church
pizza sandwich burger biscuit waffle omelet sausage pretzel muffin doughnut
tuxedo cape poncho bonnet beret turban kimono toga scarf mitten
pebble mountain valley volcano glacier island lake brick magnet rope
basket bottle barrel spoon pot newspaper poem statue poster ticket
contract triangle sonnet pillow blanket suitcase passport bridge needle pencil
""",
    "test": """
tulip daisy daffodil carnation marigold dahlia geranium sunflower orchid cactus
carrot cabbage onion turnip leek potato cauliflower parsnip radish tomato
jacket coat cardigan dress vest waistcoat blazer skirt blouse sweater
pistol dagger spear cannon crossbow musket grenade revolver sword rifle
diamond ruby emerald sapphire opal topaz garnet amethyst necklace brooch
kayak yacht ferry dinghy gondola schooner catamaran helicopter rocket tricycle
cookie brownie cupcake tart scone baguette quiche custard cucumber pumpkin
cathedral lighthouse windmill pyramid igloo temple mosque garage museum stadium
desert canyon waterfall meteor rainbow sculpture photograph magazine dictionary trophy
umbrella teapot fork plate carpet chair engine saxophone harmonica piano
""",
}

# {x} is the thing with its article. All ask the same: is it an animal?
ANIMALS_WORDINGS: dict[str, tuple[str, ...]] = {
    "train": (
        "Is {x} an animal?",
        "Does {x} belong to the animal kingdom?",
        "Is {x} a member of some animal species?",
        "Should {x} be listed with the animals?",
        "Does {x} move with muscles?",
    ),
    "test": (
        "Does {x} count as a creature?",
        "Is there a brain inside {x}?",
        "Was {x} once born or hatched?",
        "Can {x} feel hunger?",
        "Might {x} look for a mate?",
    ),
}

# --------------------------------------------------------------------------- task 2: uses

# One theme a paragraph, "thing: use" separated by semicolons. Wrong options come from three other
# themes, so that no wrong option is a second right one.
USES_TEXT: dict[str, str] = {
    "train": """
a hammer: pounding pegs; a drill: boring holes; a saw: cutting planks;
a wrench: loosening bolts; an axe: chopping logs;
sandpaper: smoothing rough wood; a paintbrush: decorating walls; a ladder: reaching high places

a kettle: boiling water; an oven: baking bread; a saucepan: simmering stew;
a knife: slicing meat; a corkscrew: uncorking bottles; a sieve: sifting flour;
a rolling pin: flattening dough; a cup: drinking tea

a pen: signing letters; an eraser: rubbing out mistakes; a keyboard: typing text;
a calculator: adding numbers; an envelope: mailing documents; a diary: confessing secrets;
a stapler: joining pages; glue: sticking things together; a pencil: sketching drawings

a shovel: digging soil; a rake: gathering leaves; a lawnmower: trimming the grass;
a hose: watering plants; a wheelbarrow: moving earth; a greenhouse: growing seedlings;
fertilizer: feeding crops; a pergola: shading a patio

a toothbrush: cleaning teeth; a razor: shaving a beard; shampoo: washing hair;
perfume: smelling nice; a tissue: blowing your nose; soap: removing germs;
a towel: drying the body

a stethoscope: hearing heartbeats; a bandage: covering wounds; a syringe: injecting medicine;
an aspirin: easing pain; a crutch: walking when injured; an ambulance: rushing to hospital

a television: watching shows; a telephone: talking to friends; headphones: private listening;
a microphone: recording voices; a telescope: studying stars; a battery: storing power;
a printer: making paper copies

a thermometer: measuring temperature; a ruler: checking length; a compass: finding north;
a metronome: setting the tempo; a scale: weighing things; a barometer: predicting storms

a helmet: protecting the head; a padlock: securing gates; a parachute: falling safely;
an extinguisher: putting out flames; a fence: marking borders; handcuffs: restraining prisoners

a suitcase: packing for trips; a passport: entering other countries; a bus: carrying passengers;
an airplane: flying abroad; an elevator: going between floors; a map: planning a route;
a bridge: crossing rivers; a submarine: diving undersea

a pillow: resting in bed; a blanket: keeping warm; a crib: putting babies to sleep;
a bookcase: shelving novels; a sofa: sitting comfortably; a wardrobe: hanging up outfits

a needle: sewing cloth; a loom: weaving fabric; yarn: knitting mittens;
a tape recorder: capturing sound; a thimble: guarding the thumb

a treadmill: running indoors; a dumbbell: building muscle; a racket: hitting balls;
a tent: camping outdoors; a hammock: lounging between trees; a bicycle: pedaling to work

a trumpet: playing jazz; a doll: pretend play; a puzzle: fitting pieces together;
a novel: reading stories; a theater: seeing actors perform; a violin: playing in orchestras

a bank: saving money; a school: teaching children; a bakery: selling loaves;
a church: praying together; a hotel: staying overnight; a prison: locking up criminals;
a factory: producing goods
""",
    "test": """
a toaster: browning slices; a blender: mixing smoothies; a microwave: reheating leftovers;
a whisk: beating eggs; a peeler: skinning potatoes; a colander: draining pasta;
a ladle: serving soup; a spatula: flipping pancakes; a refrigerator: chilling groceries;
a straw: sipping soda; a grill: barbecuing burgers

a broom: sweeping floors; a mop: wiping up spills; a vacuum: sucking up dust;
a plunger: unclogging toilets; a bucket: hauling liquids; a dustbin: collecting garbage;
a washer: doing laundry

a highlighter: marking sentences; chalk: writing on blackboards; a stamp: paying for postage;
a bookmark: saving your place; a dictionary: looking up words; a crayon: coloring pictures;
a shredder: destroying records; a projector: displaying slides

a comb: untangling curls; a mirror: seeing your reflection; lipstick: reddening the mouth;
tweezers: pulling splinters; deodorant: hiding sweat; lotion: moisturizing skin

a vaccine: preventing infection; a scalpel: performing surgery; an inhaler: treating asthma;
a stretcher: transporting patients; an antibiotic: killing bacteria; eyeglasses: correcting vision

a camera: taking photographs; a lamp: brightening a room; a radio: tuning in to broadcasts;
a flashlight: exploring dark caves; a microscope: examining cells; binoculars: spotting wildlife;
a fan: cooling the air; a radiator: heating apartments

a clock: telling the time; a calendar: tracking dates; an hourglass: counting minutes;
a seismograph: detecting earthquakes; a sundial: reading shadows; an odometer: logging miles

an airbag: cushioning crashes; a siren: warning of danger; goggles: shielding the eyes;
a key: unlocking doors; a vault: guarding gold; a mask: concealing the face;
armor: surviving battle

a canoe: paddling downstream; a rocket: launching satellites; a sled: sliding over snow;
a saddle: riding horses; a tunnel: driving through mountains; a runway: landing jets;
an anchor: mooring ships; a crane: lifting heavy loads; a bulldozer: clearing rubble

a guitar: strumming chords; a drum: pounding rhythms; a kite: soaring in the wind;
a trampoline: bouncing up and down; a swing: playground fun; dice: playing board games;
skis: gliding down slopes; a balloon: celebrating birthdays

a belt: holding up pants; an apron: staying clean while cooking; a sock: covering toes;
a zipper: closing jackets; a swimsuit: bathing at the beach; a button: fastening shirts

a rifle: shooting targets; a sword: dueling knights; a shield: blocking blows;
a trap: catching mice; bait: luring animals; a net: scooping butterflies

a vase: arranging flowers; a curtain: blocking sunlight; a rug: softening hard flooring;
a doorbell: announcing visitors; a chimney: releasing smoke; a candle: giving a gentle glow;
a coffin: burying the dead

a library: borrowing books; a museum: exhibiting art; a stadium: hosting matches;
a pharmacy: buying pills; a courtroom: judging lawsuits; a laboratory: conducting experiments;
a cemetery: remembering ancestors
""",
}

USES_WORDINGS: dict[str, tuple[str, ...]] = {
    "train": (
        "What use is made of {x}?",
        "What do people do with {x}?",
        "Which job suits {x}?",
        "Name the normal use of {x}.",
        "Choose what {x} can help with.",
    ),
    "test": (
        "What would you need {x} for?",
        "Which activity calls for {x}?",
        "Pick the purpose of {x}.",
        "Why might somebody want {x}?",
        "Having {x} matters most for what?",
    ),
}

# Steps through the list of things: row i offers the use of things i, i + a, i + b, i + c. Every
# use is then the right option once a round and a wrong one three times, so knowing the options
# alone does not help. The steps are wider than a theme, so the four themes differ.
USES_STEPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "train": ((23, 47, 71), (18, 40, 63), (31, 55, 80)),
    "test": ((23, 47, 71), (18, 40, 63)),
}

# --------------------------------------------------------------------------- task 3: search ads


@dataclass(frozen=True)
class Family:
    """Products that a shop keeps on one shelf; the attributes exclude one another."""

    area: str
    attributes: tuple[str, ...]
    products: tuple[str, str, str, str]


def _family(area: str, attributes: str, products: str) -> Family:
    one, two, three, four = (name.strip() for name in products.split(","))
    return Family(area, tuple(attributes.split()), (one, two, three, four))


# Families of one area stand together: an irrelevant ad is taken from another area.
SHELVES: dict[str, tuple[Family, ...]] = {
    "train": (
        _family("wear", "leather suede canvas", "boots, sandals, sneakers, slippers"),
        _family("wear", "wool fleece cashmere", "scarf, gloves, mittens, beanie"),
        _family("tech", "red black blue", "headphones, speaker, microphone, earbuds"),
        _family("home", "blue brown red", "pillow, blanket, quilt, mattress"),
        _family("home", "oak pine walnut", "bookcase, wardrobe, desk, sideboard"),
        _family("home", "steel iron copper", "frying pan, saucepan, wok, kettle"),
        _family("home", "blue brown orange", "towel, bathrobe, shower cap, bath mat"),
        _family("food", "salted roasted raw", "almonds, peanuts, cashews, pistachios"),
        _family("food", "strawberry banana cherry", "jam, yogurt, ice cream, milkshake"),
        _family("outdoor", "black red blue", "dumbbells, treadmill, yoga mat, kettlebell"),
        _family("outdoor", "red black orange", "bicycle, bike helmet, bike lock, bike pump"),
        _family("kids", "wooden rubber cardboard", "puzzle, doll, toy train, building blocks"),
        _family("work", "electric manual pneumatic", "drill, sander, saw, screwdriver"),
        _family("work", "steel wooden aluminum", "shovel, rake, hoe, wheelbarrow"),
        _family("office", "red blue black", "pen, pencil, marker, notebook"),
        _family("pets", "small large medium", "dog collar, cat tree, dog bed, aquarium"),
    ),
    "test": (
        _family("wear", "green white pink", "shirt, blouse, sweater, hoodie"),
        _family("wear", "denim linen cotton", "skirt, shorts, trousers, overalls"),
        _family("wear", "gold silver pearl", "necklace, bracelet, earrings, ring"),
        _family("sport", "white green yellow", "skis, snowboard, sled, skates"),
        _family("sport", "pink yellow purple", "swimsuit, goggles, snorkel, swim fins"),
        _family("house", "ceramic glass plastic", "plate, bowl, mug, jug"),
        _family("house", "white gray green", "blender, toaster, microwave, juicer"),
        _family("house", "velvet linen cotton", "drapes, cushion, tablecloth, rug"),
        _family("house", "brass glass bamboo", "lamp, lantern, chandelier, vase"),
        _family("house", "gray green yellow", "broom, mop, dustpan, bucket"),
        _family("sweets", "vanilla mint caramel", "chocolate, cake, cookies, fudge"),
        _family("gadgets", "gray white silver", "camera, tripod, drone, camcorder"),
        _family("gadgets", "pink white gold", "phone case, phone charger, tablet, smartwatch"),
        _family("music", "white purple green", "guitar, ukulele, piano, drum kit"),
        _family("beauty", "pink purple gold", "lipstick, eyeliner, eyeshadow, mascara"),
        _family("gifts", "white pink yellow", "roses, tulips, lilies, orchids"),
        _family("gifts", "gold silver purple", "balloons, party hats, streamers, confetti"),
    ),
}

# Train asks for each product with two attributes, test with one.
SEARCH_ROUNDS = {"train": 2, "test": 1}

# {p} is the product with its attribute.
QUERY_WORDINGS: dict[str, tuple[str, ...]] = {
    "train": ("buy {p}", "find {p}", "shop {p}", "need {p}"),
    "test": ("order {p}", "best {p}", "compare {p}", "get {p}"),
}
AD_WORDINGS: dict[str, tuple[str, ...]] = {
    "train": (
        "Now in stock: {p}. Free delivery.",
        "Our {p} at a fair price. Ships today.",
        "New season {p}. Easy returns.",
        "Choose our {p}. Save now.",
        "Tested and trusted {p}. Good value.",
        "Big sale on {p}. While stocks last.",
    ),
    "test": (
        "Top seller: {p}. Pick up in store.",
        "Just arrived, {p}. Fast shipping.",
        "Discover {p}. Gift wrap included.",
        "Expect {p} made to last. Full guarantee.",
        "Treat yourself to {p}. Limited offer.",
        "Looking for {p}? Pay later with us.",
    ),
}

# --------------------------------------------------------------------------- building


STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "and",
        "with",
        "for",
        "in",
        "to",
        "up",
        "out",
        "on",
        "by",
        "pair",
        "piece",
    ]
)


def content_words(text: str) -> set[str]:
    """The words of `text` in lower case without articles and plural endings."""
    words = re.findall(r"[a-z]+", text.lower())
    return {re.sub(r"(?<=[a-z]{3})s$", "", word) for word in words if word not in STOP_WORDS}


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _order(key: str) -> str:
    return hashlib.sha256(f"{SEED}|{key}".encode()).hexdigest()


def _shuffled(examples: Iterable[Example]) -> list[Example]:
    """An order without pattern; by hash, as it must not depend on the Python version."""
    return sorted(examples, key=lambda example: _order(json.dumps(example.row)))


def things(split: str) -> list[tuple[str, str]]:
    """(label, thing) of the yes/no task."""
    return [
        (label, thing)
        for label, text in (("yes", ANIMALS[split]), ("no", OTHERS[split]))
        for thing in text.split()
    ]


def _animals(split: str) -> Iterator[Example]:
    """Each thing once; each wording as often with an animal as with something else."""
    wordings = ANIMALS_WORDINGS[split]
    for index, (label, thing) in enumerate(things(split)):
        wording = wordings[index % len(wordings)]
        row: Row = {"question": wording.format(x=with_article(thing)), "answer": label}
        yield Example(row, label, (wording,), (thing,))


def uses(split: str) -> list[tuple[int, str, str]]:
    """(theme number, thing with its article, use) in the order of the text."""
    found = []
    for theme, paragraph in enumerate(USES_TEXT[split].strip().split("\n\n")):
        for item in " ".join(paragraph.split()).split(";"):
            thing, use = item.split(":")
            found.append((theme, thing.strip(), use.strip()))
    return found


def _uses(split: str) -> Iterator[Example]:
    things = uses(split)
    wordings = USES_WORDINGS[split]
    for number, steps in enumerate(USES_STEPS[split]):
        for index, (_, thing, use) in enumerate(things):
            wrong = [things[(index + step) % len(things)][2] for step in steps]
            wrong.sort(key=lambda text: _order(f"{number}|{thing}|{text}"))
            # Four places, five wordings: counting on, every pair of them comes equally often.
            count = index + number * len(things)
            place = count % 4
            options = [*wrong[:place], use, *wrong[place:]]
            wording = wordings[count % len(wordings)]
            row: Row = {"question": wording.format(x=thing), "options": options, "answer": use}
            yield Example(row, "ABCD"[place], (wording,), (thing,))


def _search_ads(split: str) -> Iterator[Example]:
    """Each query three times, with one ad of each grade, all in the same wordings.

    relevant: the product and the attribute asked for. partial: by turns the product with another
    attribute, or another product of the family with the attribute. irrelevant: a product of
    another area, with the attribute asked for wherever that product can have it.
    """
    goods = [
        (family, number, product)
        for family in SHELVES[split]
        for number, product in enumerate(family.products)
    ]
    areas = [family.area for family, _, _ in goods]
    # The goods of one area stand together, so this many steps on is always another area.
    leap = max(areas.count(area) for area in areas)
    for turn in range(SEARCH_ROUNDS[split]):
        for index, (family, number, product) in enumerate(goods):
            attribute, other = (family.attributes[(index + turn + n) % 3] for n in (0, 1))
            sibling = family.products[(number + 1 + turn) % 4]
            far, _, stranger = goods[(index + leap + 5 * turn) % len(goods)]
            shared = attribute in far.attributes
            ads = {
                "irrelevant": (attribute if shared else far.attributes[index % 3], stranger),
                "partial": (
                    (attribute, sibling) if (index + index // 4 + turn) % 2 else (other, product)
                ),
                "relevant": (attribute, product),
            }
            count = index + len(goods) * turn
            query_wording = QUERY_WORDINGS[split][count % len(QUERY_WORDINGS[split])]
            ad_wording = AD_WORDINGS[split][count // 4 % len(AD_WORDINGS[split])]
            for grade, ad in ads.items():
                row: Row = {
                    "query": query_wording.format(p=f"{attribute} {product}"),
                    "ad": ad_wording.format(p=" ".join(ad)),
                    "grade": grade,
                }
                entities = (attribute, product, *ad)
                yield Example(row, grade, (query_wording, ad_wording), entities)


BUILDERS = {"animals": _animals, "uses": _uses, "search_ads": _search_ads}


def build() -> dict[str, dict[str, list[Example]]]:
    """All examples: task, then split, in the order of the files."""
    return {
        task: {split: _shuffled(builder(split)) for split in SPLITS}
        for task, builder in BUILDERS.items()
    }


def render() -> dict[str, str]:
    """The text of each file, by its path below this folder."""
    return {
        f"{task}/{split}.jsonl": "".join(json.dumps(e.row) + "\n" for e in examples)
        for task, splits in build().items()
        for split, examples in splits.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a file differs")
    arguments = parser.parse_args(argv)
    stale = []
    for name, text in render().items():
        path = HERE / name
        if path.is_file() and path.read_bytes() == text.encode("ascii"):
            continue
        stale.append(name)
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("ascii"))
    for name in stale:
        print(f"{'differs' if arguments.check else 'written'}: {name}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
