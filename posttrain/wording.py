"""What tone data says: each point of an enquiry or an answer at three levels of politeness, and how a level is asked for."""
# ruff: noqa: E501  (a Japanese character counts as two columns)

from typing import Literal, NamedTuple

Tone = Literal["plain", "polite", "formal"]
TONES: tuple[Tone, ...] = ("plain", "polite", "formal")


class Point(NamedTuple):
    """One thing to say: the line of the note that states it, and the sentence at each level. `[a|b]`: either."""

    note: str
    plain: str
    polite: str
    formal: str


QUANTITY = Point(
    "数量: {quantity:,}",
    "数量は{quantity:,}[だ|である]。",
    "数量は{quantity:,}です。",
    "数量は{quantity:,}でございます。",
)
ORDER = Point(
    "注文番号: {order_no}",
    "注文番号は{order_no}[だ|である]。",
    "注文番号は{order_no}です。",
    "注文番号は{order_no}でございます。",
)
SERIAL = Point(
    "管理番号: {serial}",
    "管理番号は{serial}[だ|である]。",
    "管理番号は{serial}です。",
    "管理番号は{serial}でございます。",
)
START = Point(
    "変更日: {start}",
    "変更は{start}から[とする|だ]。",
    "変更は{start}から[とします|です]。",
    "変更は{start}より[とさせていただきます|でお願いいたします]。",
)
OP = Point("操作: {op}", "対象は{op}[だ|である]。", "対象は{op}です。", "対象は{op}でございます。")
SYMPTOM = Point(
    "症状: {symptom}",
    "「{symptom}」という症状[だ|である]。",
    "「{symptom}」という症状です。",
    "「{symptom}」という症状でございます。",
)
INQUIRY_NO = Point(
    "受付番号: {inquiry_no}",
    "受付番号は{inquiry_no}[だ|である]。",
    "受付番号は{inquiry_no}です。",
    "受付番号は{inquiry_no}[でございます|となっております]。",
)

# The first point of a category says what the matter is and is always there; the others come and go.
ASKED = {
    "見積依頼": (
        Point("用件: {product}の見積もりの依頼", "{product}の見積もりを[依頼する|頼む]。", "{product}の見積もりを[お願いします|頼みたいです]。", "{product}のお見積もりを[お願い申し上げます|お願いできますでしょうか|頂戴したく存じます]。"),
        QUANTITY,
        Point("予算: 税込{amount:,}円", "予算は税込{amount:,}円[だ|である|を見込む]。", "予算は税込{amount:,}円[です|を見込んでいます]。", "予算は税込{amount:,}円を[予定しております|見込んでおります]。"),
    ),
    "納期確認": (
        Point("用件: {product}の納期の確認", "{product}の納期を[知りたい|確認したい]。", "{product}の納期を[教えてください|知りたいです]。", "{product}の納期を[お知らせいただけますでしょうか|ご教示いただけますと幸いです]。"),
        QUANTITY,
        ORDER,
    ),
    "不具合": (
        Point("用件: {product}の不具合の連絡", "{product}に不具合が[出た|出ている|見つかった]。", "{product}に不具合が[出ました|出ています|見つかりました]。", "{product}に不具合が[発生しております|見つかり、ご連絡いたしました]。"),
        SYMPTOM,
        SERIAL,
    ),
    "請求確認": (
        Point("用件: {product}の請求額の確認", "{product}の請求額を確認して[ほしい|もらいたい]。", "{product}の請求額を確認して[ください|ほしいです]。", "{product}のご請求額をご確認[いただけますでしょうか|くださいますようお願いいたします]。"),
        Point("請求額: {amount:,}円(注文控えでは{expected:,}円)", "請求は{amount:,}円だが、注文控えでは{expected:,}円[だ|となっている]。", "請求は{amount:,}円ですが、注文控えでは{expected:,}円[です|となっています]。", "ご請求は{amount:,}円ですが、弊社の注文控えでは{expected:,}円となっております。"),
        ORDER,
    ),
    "契約変更": (
        Point("用件: {product}の契約数を{quantity:,}から{quantity_after:,}に変更", "{product}の契約数を{quantity:,}から{quantity_after:,}に変更[したい|してほしい]。", "{product}の契約数を{quantity:,}から{quantity_after:,}に変更[したいです|してください]。", "{product}の契約数を{quantity:,}から{quantity_after:,}に変更[いたしたく存じます|していただきたく、お願い申し上げます]。"),
        START,
        SERIAL,
    ),
    "返品交換": (
        Point("用件: {product}の返品または交換の相談", "{product}の返品か交換を相談[したい|する]。", "{product}の返品か交換を[相談させてください|相談したいです]。", "{product}の返品または交換について[ご相談申し上げます|ご相談させていただきたく存じます]。"),
        QUANTITY,
        ORDER,
    ),
    "資料送付": (
        Point("用件: {product}の資料の送付依頼", "{product}の資料[が要る|を送ってほしい|を取り寄せたい]。", "{product}の資料を[送ってください|送ってほしいです]。", "{product}の資料を[お送りいただけますでしょうか|お送りくださいますようお願い申し上げます]。"),
        QUANTITY,
    ),
    "操作方法": (
        Point("用件: {product}の操作方法の確認", "{product}の操作方法を[知りたい|確認したい]。", "{product}の操作方法を[教えてください|知りたいです]。", "{product}の操作方法を[ご教示いただけますでしょうか|ご説明いただきたく存じます]。"),
        OP,
        SERIAL,
    ),
}  # fmt: skip
ASKED_LAST = (
    Point("回答の期限: {deadline}", "回答は{deadline}までに[ほしい|もらう必要がある]。", "回答は{deadline}までに[お願いします|ください]。", "ご回答は{deadline}までに[いただけますと幸いです|賜りたく存じます|頂戴できますでしょうか]。"),
    Point("連絡先: {reply_to}", "連絡先は{reply_to}[だ|である]。", "連絡先は{reply_to}です。", "ご連絡は{reply_to}まで[お願いいたします|頂戴できますと幸いです]。"),
    INQUIRY_NO,
)  # fmt: skip
ANSWERED = {
    "見積依頼": (
        Point("用件: {product}の見積もりの回答", "{product}の見積もりを[知らせる|伝える]。", "{product}の見積もりを[お知らせします|伝えます]。", "{product}のお見積もりを[ご案内いたします|ご報告申し上げます]。"),
        QUANTITY,
        Point("単価: {price:,}円、合計: 税込{total:,}円", "単価は{price:,}円、合計は税込{total:,}円[だ|である|になる]。", "単価は{price:,}円、合計は税込{total:,}円[です|になります]。", "単価は{price:,}円、合計は税込{total:,}円[でございます|と算出いたしました]。"),
        Point("有効期限: {valid}", "見積もりは{valid}まで有効[だ|である]。", "見積もりは{valid}まで有効です。", "お見積もりは{valid}まで有効でございます。"),
    ),
    "納期確認": (
        Point("用件: {product}の納期の回答", "{product}の納期を[知らせる|連絡する]。", "{product}の納期を[お知らせします|連絡します]。", "{product}の納期を[ご連絡申し上げます|お知らせいたします]。"),
        Point("発送: {ship}、到着: {arrive}", "発送は{ship}、到着は{arrive}[だ|になる]。", "発送は{ship}、到着は{arrive}[です|になります]。", "{ship}に発送し、{arrive}に到着する見込みで[ございます|おります]。"),
    ),
    "不具合": (
        Point("用件: {product}の不具合の回答", "{product}の不具合を[調べた|調査した]。", "{product}の不具合を[調べました|調査しました]。", "{product}の不具合について[調査いたしました|お調べいたしました]。"),
        SYMPTOM,
        Point("発送: {ship}、訪問: {arrive}", "部品などは{ship}に送り、{arrive}に担当者が訪問する。", "部品などは{ship}に送り、{arrive}に担当者が訪問します。", "部品などを{ship}に発送し、{arrive}に担当者が[お伺いいたします|伺います]。"),
    ),
    "請求確認": (
        Point("用件: {product}の請求額の訂正", "{product}の請求額を[訂正する|直す]。", "{product}の請求額を[訂正します|直します]。", "{product}のご請求額を[訂正いたします|訂正させていただきます]。"),
        Point("誤り: {amount:,}円、正しい額: {expected:,}円", "{amount:,}円は誤りで、正しくは{expected:,}円[だ|である]。", "{amount:,}円は誤りで、正しくは{expected:,}円です。", "{amount:,}円は誤りで、正しくは{expected:,}円でございます。"),
        Point("訂正した請求書の発送: {ship}", "訂正した請求書は{ship}に[送る|発送する]。", "訂正した請求書は{ship}に[送ります|発送します]。", "訂正した請求書は{ship}に[お送りいたします|発送いたします]。"),
    ),
    "契約変更": (
        Point("用件: {product}の契約数の変更({quantity:,}から{quantity_after:,}へ)の受付", "{product}の契約数の変更({quantity:,}から{quantity_after:,}へ)を受け付けた。", "{product}の契約数の変更({quantity:,}から{quantity_after:,}へ)を受け付けました。", "{product}の契約数の変更({quantity:,}から{quantity_after:,}へ)を[承りました|お受けいたしました]。"),
        Point("変更後の料金: {fee:,}円", "変更後の料金は{fee:,}円[だ|になる]。", "変更後の料金は{fee:,}円[です|になります]。", "変更後の料金は{fee:,}円[でございます|となり、ご案内申し上げます]。"),
        START,
    ),
    "返品交換": (
        Point("用件: {product}の返品または交換の受付", "{product}の返品か交換を[受け付けた|引き受けた]。", "{product}の返品か交換を[受け付けました|引き受けました]。", "{product}の返品または交換を[承りました|お受けいたしました]。"),
        QUANTITY,
    ),
    "資料送付": (
        Point("用件: {product}の資料の発送", "{product}の資料を[送る|発送する]。", "{product}の資料を[送ります|発送します]。", "{product}の資料を[お送りいたします|発送いたします]。"),
        Point("発送日: {ship}", "発送日は{ship}[だ|である]。", "発送日は{ship}です。", "発送日は{ship}でございます。"),
        Point("標準価格: {price:,}円", "標準価格は{price:,}円[だ|である]。", "標準価格は{price:,}円です。", "標準価格は{price:,}円でございます。"),
    ),
    "操作方法": (
        Point("用件: {product}の操作方法の回答", "{product}の操作方法を[知らせる|説明する]。", "{product}の操作方法を[お知らせします|説明します]。", "{product}の操作方法を[ご案内いたします|ご説明申し上げます]。"),
        OP,
    ),
}  # fmt: skip
ANSWERED_LAST = (
    Point("担当: {clerk}", "担当は{clerk}[だ|である]。", "担当は{clerk}です。", "担当は{clerk}でございます。"),
    INQUIRY_NO,
)  # fmt: skip
POINTS = {"問い合わせ": (ASKED, ASKED_LAST), "回答": (ANSWERED, ANSWERED_LAST)}
OPENING = {
    "plain": "",
    "polite": "",
    "formal": "[平素より大変お世話になっております。\n|いつもお世話になっております。\n|]",
}
CLOSING = {
    "plain": "",
    "polite": "[\nよろしくお願いします。|]",
    "formal": "[\n何卒よろしくお願い申し上げます。|\nどうぞよろしくお願いいたします。|]",
}
MANNER: dict[Tone, str] = {
    "plain": "[社内メモの常体(だ・である調)|「だ・である」の常体|社内だけで読むメモの常体|敬語を使わない、だ・である調]",
    "polite": "[「です・ます」の丁寧な文体|社内の他部署に送る「です・ます」調|です・ます調の丁寧語|丁寧な「です・ます」調]",
    "formal": "[取引先に送れる敬語|お客様向けの改まった敬語|社外の取引先にあてた敬語|尊敬語と謙譲語を使った取引先向けの文体]",
}
SYSTEM = (
    "あなたは文書係です。文章は{manner}で書いてください。",
    "回答は必ず{manner}にすること。",
    "文体の指定: {manner}",
)
WRITE = (
    "[次の|以下の]内容を[文章にして|伝える文を書いて]ください。",
    "このメモをもとに[連絡文|文章]を作成してください。",
    "箇条書きの内容を漏らさず[文章にまとめて|つないで]ください。",
)
REWRITE = (
    "[次の|以下の]文章の[文体を改めて|言葉遣いを直して]ください。",
    "内容を変えずに[書き直して|書き換えて]ください。",
)
ASK = ("文体は{manner}とします。", "{manner}でお願いします。", "{manner}に[すること|してください]。")
