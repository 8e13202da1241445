"""How often ptb_words agrees with Stanford's tokenizer on 20,000 made-up captions.

    python tests/compare_ptb.py [SEED]

Needs Java and pycocoevalcap. Prints the share of lines that agree, and the first 20 that do not.
About a third of the lines have something odd. Some can never agree: Stanford's tokenizer keeps the
period of "vitamin C." or not, as the next sentence begins, and at the end of a line it looks at the
next one.
"""

import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tokenizer import ptb_words


def table(text: str) -> list[str]:
    return [entry.strip() for entry in text.split("|")]


DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()
WHO = table("""a man|two men|a woman|the woman|a young boy|three girls|a small dog|several people
    |a group of people|House|Wilson|Dr. Foreman|Mr. Smith|Mrs. Bing|Joey|Monica|Rachel|Sheldon
    |Castle|a baseball player|the chef|a giraffe|a black cat|Robin|an elderly couple|one person
    |Capt. Montgomery|Lt. Kate Beckett|Amy|Ted|a t-shirt-wearing man|a 10-year-old girl|they|she
    |St. Bernard dogs|Meredith|Alex|Dr. O'Malley|a mother and her child|the U.S. team
    |John F. Kennedy|people""")
DOES = table("""is sitting on|stands next to|walks towards|is holding|looks at|talks to|are riding
    |picks up|is eating|throws|puts down|hands over|is standing by|leans against|is looking at
    |plays with|adds some salt to|cuts|stirs|pours|are in front of|tells her about|opens
    |is about to kiss|turns around and sees|is taking a picture of|points at|runs after|flips""")
WHAT = table("""a red bench|the couch|a slice of pizza|the table|a tennis racket|a bus
    |his motorcycle|a surf board|the kitchen counter|a large clock tower|an umbrella
    |the fire hydrant|two zebras|a double-decker bus|some chopped onions|a well-lit room
    |the stop sign|her cell phone|a laptop|the door|a bowl of soup|the black-and-white photo
    |olive oil|a Christmas tree|the parking meter|an old-fashioned train|the x-ray|a cup of coffee
    |the hospital bed|a plate of food|his desk""")
WHERE = table("""in a park|on the street|at night|near the water|in the background|while it rains
    |in front of a building|on a snowy day|with a knife and fork|next to a parked car|during a game
    |before leaving|under a blue sky|in the room|on top of it|after a while|behind the fence
    |and smiles|with his hand|in black and white|at the table|as she leaves""")
CLITICS = table("""it's|that's|he's|they're|we've|I'm|she'll|he'd|you'd've|isn't|can't|won't|don't
    |doesn't|wasn't|cannot|gonna|wanna|gotta|lemme|gimme|o'clock|ma'am|y'all|c'mon|ain't|couldn't
    |should've|let's|who's|there's|Can't|DON'T|It's|didn’t|he’s|the man's hat|the dogs' toys
    |Wilson's|James' car|the women's room|a men's suit|Joey's and Chandler's|the boy 's hat|'em|'til
    |'cause|rock 'n' roll|mac 'n cheese|O'Hare|D'Angelo|d'oeuvres|Lay's|McDonald's|Levi's|'tis|'twas
    |kids'""")
NUMBERS = table("""5|12|3.5|1,000|25,000|1/2|3/4|1 1/2|2-3|10-15|5:30|10:30am|8 a.m.|9:45 p.m.|7pm
    |12 o'clock|the 1950s|the '90s|1990's|$5|$1.50|$2,500|50%|100 %|5 %|350 degrees|350°|350°F|20° C
    |1st|2nd|21st|10cm|5 cm|2x4|4x4|6'2"|5'10|12" pizza|1/4" thick|#1|No. 5|no. 7|#23|24/7|Rt. 66
    |the summer of '98|10,000 ft.|100 lbs.|5 oz. of|2 tbsp. of|6 in.|½ cup|2½|¼|-5|+3|1980s-style
    |2014|12/25/2010|9/11|3D|747|F-16|R2-D2|50-50|€20|£5|99¢|555-1234|1000|20 ft.|32 min.|2.5-inch
    |007""")
ABBREVIATED = table("""U.S.|U.K.|U.S.A.|N.Y.|L.A.|D.C.|Dr.|Mr.|Mrs.|Ms.|Jr.|Sr.|St.|vs.|etc.|e.g.
    |i.e.|a.m.|p.m.|Inc.|Co.|Ltd.|Ave.|Blvd.|approx.|Jan.|Feb.|Mar. 3rd|Sept.|Mt. Rushmore
    |Prof. Brown|Sgt. Pepper|Ph.D.|M.D.|R.V.|T.V.|B.B.Q.|a.k.a.|J.D.|W. Bush|Ill.|Wash.|Mass.|Miss.
    |ill.|mass.|min.|max.|sec.|Fig. 3|fig.|Alex.|No.|no.|plan B.|vitamin C.|I.D.|TV.|OK.|D.J.""")
JOINED = table("""and/or|his/her|he/she|w/|w/o|black/white|a / b|t-shirt/shorts|sofa/couch/chair
    |self-portrait|close-up|hot-air|X-ray|up-close|half-eaten|T-shirt|multi-colored|two-story|semi-
    |pre- and post-war|red-|-left|snow_board|under_score|suit,holding|table.The|cup.Then|man,woman
    |food;drink|bus:red|hello!there|what?no|R&B|B&B|AT&T|M&Ms|H&M|Q&A|black & white|mom&dad|PB&J
    |salt &amp; pepper|A+|C++|x+y|a=b|rock+roll|man--woman|man -- woman|man - woman|one – two
    |one—two|wait...|wait…|so...what|Coca-Cola's|mother-in-law's|Ping-Pong|wi-fi|i-pad|Chick-fil-A
    |co-workers|a..b|well .|then ,|so ... then|hmm....""")
QUOTED = table("""'stop'|"stop"|"STOP"|“stop”|‘stop’|``stop''|"no parking"|'one way'|(left)
    |(on the right)|[unk]|<unk>|<start>|{x}|"I love you."|"What?"|"Hey!" she says|'no|(front, left)
    |( left )|"Main St."|sign that says "5th Ave"|*laughs*|[laughs]|(?)|"don't walk"|'don't'
    |the word 'yes'|the "Mona Lisa"|the letter "E"|an "M"|(in red)|word(s)|"24 Hours"|`left`""")
ONLINE = table(""":)|:-)|:(|;)|:D|:P|<3|=)|:-(|XD|^_^|www.example.com|http://flickr.com/x_1
    |https://a.com/b?c=d|flickr.com|foo@bar.com|@user|@user_1|#tag|#nofilter|# 5|@ the park
    |example.org/photo|IMG_1234|photo.jpg|Photo by J. Doe|© 2010|Nike®|iPhone™|5★|♥|😀|❤️|•|~ 5
    |back\\slash|x^2|* *|>|->|==|%|$|&|+|_|__|---|-----|!|!!|?!|???|@@|##|\\|^|~""")
LETTERED = table("""café|Café|jalapeño|piñata|naïve|crème brûlée|fiancée|résumé|Beyoncé|El Niño
    |señor's|São Paulo|Zürich|déjà-vu|日本|Мир|ÉTÉ|Renée's|à la mode|über-cool|Pokémon|façade.
    |Häagen-Dazs|entrée/dessert|Noël, 5""")
ODD = [CLITICS] * 3 + [NUMBERS, ABBREVIATED, JOINED, QUOTED] * 2 + [ONLINE, LETTERED]
ENDS = [".", ".", ".", ".", "", "", "", " .", "!", "?", "...", ".)", '."', "!!", ". ", "  ", ";",
        ",", " etc.", "'s"]


def sentence(lot: random.Random) -> str:
    """A caption; in about a third of them one to three odd words."""
    words = " ".join(lot.choice(part) for part in (WHO, DOES, WHAT, WHERE)).split(" ")
    if lot.random() < 0.3:
        words[0] = words[0].capitalize()
    if lot.random() < 0.15:
        if lot.random() < 0.5:
            words += ["and", "then", "leaves"]
        else:
            words += [",", "and", lot.choice(WHO), "waits"]
    if lot.random() < 0.36:
        for _ in range(lot.choice((1, 1, 1, 2, 2, 3))):
            words.insert(lot.randrange(len(words) + 1), lot.choice(lot.choice(ODD)))
        if lot.random() < 0.1:
            words.insert(lot.randrange(len(words)), "")                     # two spaces
        end = lot.choice(ENDS)
    else:
        end = lot.choice((".", ".", ""))
    text = " ".join(words) + end
    if lot.random() < 0.1:
        text += " " + sentence(lot)
    return text.upper() if lot.random() < 0.02 else text


def stanford(lines: list[str]) -> list[str]:
    """What the official evaluation makes of each line."""
    package = find_spec("pycocoevalcap.tokenizer").submodule_search_locations[0]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", Path(package, "stanford-corenlp-3.4.1.jar"),
               "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with TemporaryDirectory() as folder:
        path = Path(folder, "lines.txt")
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        output = subprocess.run([*command, path], capture_output=True, check=True).stdout.decode()
    tokenized = []
    for line in output.split("\n")[:-1]:
        tokenized.append(" ".join(word for word in line.split(" ") if word not in DROPPED))
    return tokenized


def main():
    lot = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    lines = [sentence(lot) for _ in range(20_000)]
    triples = list(zip(lines, map(ptb_words, lines), stanford(lines), strict=True))
    odd = [triple for triple in triples if triple[1] != triple[2]]
    agree = len(lines) - len(odd)
    print(f"{agree:,} of {len(lines):,} lines agree ({100 * agree / len(lines):.2f} %)")
    for line, ours, theirs in odd[:20]:
        print(f"\n  {line!r}\n  ours {ours!r}\n  Java {theirs!r}")


if __name__ == "__main__":
    main()
