"""The embedded corpus beyond business letters: notices, minutes of meetings, FAQ and daily reports."""
# ruff: noqa: E501, SIM905  (a Japanese character counts as two columns; word lists read better split)

from data import lexicon as lex
from data import office
from data.office import DAYS, OFFICE, Desk, Facts, day

# --- notices ---------------------------------------------------------------------------------------------------------
NOTICE = """[{date}\n|発信日: {date}\n]
[お取引先各位|お客様各位|関係各位]

{vendor}
{vendor_department}

{title}

拝啓 {season}、[貴社|皆様には]ますます[ご清栄|ご健勝|ご発展]のこととお慶び申し上げます。平素は格別のお引き立てを賜り、厚く御礼申し上げます。
{body}
[何卒ご理解を賜りますようお願い申し上げます。|今後とも変わらぬお引き立てのほど、よろしくお願い申し上げます。|ご不明な点は、下記の窓口までお問い合わせください。]
敬具

記
{points}
以上

[本件に関するお問い合わせ先|お問い合わせ窓口]
{vendor} {vendor_department} {clerk}
電話: {hotline}([平日|受付時間: 平日]{hours})
メール: {clerk_mail}"""
MEMO = """社内通知
{date}
[従業員各位|社員各位|各部署の皆様]

{vendor} {department}
担当: {clerk}

{title}

[お疲れさまです。{department}の{clerk_family}です。\n|]{body}
[ご理解とご協力をお願いいたします。|ご協力のほど、よろしくお願いいたします。|各自で確認のうえ、ご対応をお願いいたします。]

{points}

[お問い合わせ|問い合わせ先]: {department} {clerk_family}([内線{extension}|内線番号 {extension}|{clerk_mail}])
※ [当日の都合が悪い方|不明な点がある方]は、{notice_by}までに{clerk_family}へご連絡ください。"""
# Title, body, points. The last four stay inside the firm.
NOTICES = (
    (
        "{product} 価格改定のお知らせ",
        "さて、{product}につきまして、[原材料費|輸送費|部品価格]の[上昇|高騰]に伴い、{effective}[出荷分より|ご注文分から]"
        "価格を改定させていただくこととなりました。[現行の価格を維持すべく努めてまいりましたが、ご了承くださいますようお願い申し上げます。|]",
        "1. 対象製品: {product}\n2. 現行価格: {price:,}円(税別)\n3. 改定価格: {new_price:,}円(税別、{raise_amount:,}円の値上げ)\n4. 実施日: {effective}",
    ),
    (
        "{vendor_site}移転のお知らせ",
        "さて、このたび弊社{vendor_site}は、{reason}に伴い、下記のとおり移転することとなりました。"
        "[新住所での業務開始は{effective}です。|なお、{effective}から新しい所在地で業務を開始いたします。]",
        "1. 新住所: {new_address}\n2. 電話番号: {new_phone}\n3. 業務開始日: {effective}\n4. 旧住所: {vendor_address}",
    ),
    (
        "[システムメンテナンス|サービス一時停止]のお知らせ",
        "さて、弊社の{product}は、[機能の改善|設備の更新|安全対策の強化]のため、下記の日時に[メンテナンス|保守作業]を実施いたします。"
        "作業中の約{span}時間は{product}をご利用いただけません。",
        "1. 対象: {product}\n2. 日時: {effective} {begin}時から{end}時まで\n3. 影響: {product}の全機能の停止",
    ),
    (
        "担当者変更のお知らせ",
        "さて、このたび弊社の[人事異動|組織変更]により、貴社を担当しております{old}に代わり、{effective}付で{clerk}が担当いたします。"
        "[{old_family}の在任中は格別のご支援を賜り、誠にありがとうございました。|]{clerk_family}に対しましても、[変わらぬ|一層の]ご支援をお願い申し上げます。",
        "1. 新担当者: {clerk}({vendor_department})\n2. 旧担当者: {old}\n3. 変更日: {effective}",
    ),
    (
        "新製品 {product} 発売のご案内",
        "さて、弊社ではこのたび、{product}を{effective}に発売することとなりました。[従来品に比べて操作が簡単になり、|耐久性を高め、|]"
        "[幅広い用途でお使いいただけます|より使いやすい製品となっております]。",
        "1. 製品名: {product}\n2. 発売日: {effective}\n3. 標準価格: {price:,}円(税別)\n4. ご予約の開始: {notice_by}",
    ),
    (
        "{product} 販売終了のお知らせ",
        "さて、長らくご愛顧いただきました{product}は、[部品の調達が困難となったため|後継品の発売に伴い]、{effective}をもちまして販売を終了いたします。"
        "[最終のご注文は{notice_by}まで承ります。|ご注文の受付は{notice_by}までとさせていただきます。]",
        "1. 対象製品: {product}\n2. 最終受注日: {notice_by}\n3. 販売終了日: {effective}\n4. 修理の受付: 販売終了後{years}年間",
    ),
    (
        "[製品説明会|活用セミナー]のご案内",
        "さて、弊社では{product}の説明会を下記のとおり開催いたします。[導入をご検討中の皆様|すでにお使いの皆様]の[ご参加|ご来場]をお待ちしております。",
        "1. 日時: {effective} {begin}時から{end}時まで\n2. 会場: {vendor_place} {vendor} {room}\n3. 定員: {people}名\n"
        "4. 参加費: 無料\n5. お申し込み: {notice_by}までに{clerk_mail}へご連絡ください。",
    ),
    (
        "{drill}の実施について",
        "{effective}に{drill}を実施します。[訓練中は業務を中断し、放送の指示に従ってください。|来客対応中の方は、お客様の安全を優先してください。]",
        "日時: {effective} {begin}時から(約{minutes}分)\n集合場所: {assembly}\n対象: {vendor_site}の全員\n責任者: {clerk}",
    ),
    (
        "定期健康診断の[実施について|お知らせ]",
        "今年度の定期健康診断を{effective}に実施します。[前日の夕食は21時までに済ませてください。|対象者には個別に受診時間を連絡します。]",
        "日時: {effective} {begin}時から{end}時まで\n会場: {room}\n対象: {people}名\n申込期限: {notice_by}",
    ),
    (
        "{product}の{change}について",
        "{vendor_site}で使用する{product}の{change}を{effective}に行います。[作業中は周辺への立ち入りをお控えください。|使い方の説明会は{room}で行います。]",
        "対象: {product} {quantity:,}{unit}\n実施日: {effective}\n場所: {vendor_site}\n作業時間: {begin}時から{end}時まで(約{span}時間)",
    ),
    (
        "経費精算の締め切りについて",
        "{notice_month}分の経費精算の締め切りは{notice_by}です。[期限を過ぎた申請は翌月の処理となります。|領収書を添えて{department}へ提出してください。]",
        "対象期間: {notice_month}1日から{notice_month}末日まで\n締切日: {notice_by}\n支払予定日: {effective}\n提出先: {department} {clerk_family}",
    ),
)
NOTICE_FACTS = """date title vendor vendor_department department product effective notice_by price new_price raise_amount
new_address new_phone old clerk clerk_mail hotline room begin end people quantity""".split()


def notice(desk: Desk) -> tuple[str, Facts]:
    """A notice to customers, or to colleagues."""
    at = office.parties(desk)
    slots = desk.slots
    which = int(desk.random() * len(NOTICES))
    title, body, points = NOTICES[which]
    # Maintenance is of software; raised prices, new goods, spare parts and swaps are of things.
    unfit = "dg" if which == 2 else "sg" if which in (5, 9) else "s" if which in (0, 4) else ""
    slots.update(office.product(desk))
    while slots["group"] in unfit:
        slots.update(office.product(desk))
    step = 10 if slots["price"] < 2000 else 100
    moved = office.company(desk)
    old = next(
        p for p in office.people(desk, slots["vendor_domain"], slots["gap"], 2) if p.family != slots["clerk_family"]
    )
    notice_by = at + desk.between(5, 12)
    begin = desk.between(9, 14)
    span = desk.between(2, 4)
    today = DAYS[OFFICE[at]]
    slots.update(
        raise_amount=max(step, slots["price"] * desk.between(3, 15) // 100 // step * step),
        effective=day(OFFICE[notice_by + desk.between(5, 40)], slots["full"]),
        notice_by=day(OFFICE[notice_by], slots["soon"]),
        notice_month=f"{today.month}月",
        new_address=moved.address,
        new_phone=moved.phone,
        old=old.name,
        old_family=old.family,
        begin=begin,
        end=begin + span,
        span=span,
        minutes=desk.between(4, 12) * 5,
        years=desk.between(3, 8),
        people=desk.between(2, 24) * 5,
        change=desk.pick(("入れ替え", "導入")),
        department=desk.pick(("総務部", "総務課", "人事部", "管理部", "庶務課", "業務部")),
        drill=desk.pick(("防災訓練", "避難訓練")),
        extension=desk.digits(4),
        room=desk.pick(lex.ROOMS[:-1]),
        assembly=desk.pick(("正面駐車場", "中庭", "正面玄関前", "第二駐車場", "屋外広場")),
        vendor_site=desk.pick(lex.SITES),
        reason=desk.pick(("業務の拡大", "建物の老朽化", "事業所の統合", "社員の増員", "物流体制の見直し")),
    )
    slots["new_price"] = slots["price"] + slots["raise_amount"]
    slots["title"] = desk.say(title)
    slots["body"] = desk.say(body)
    slots["points"] = desk.say(points)
    return desk.say(NOTICE if which < 7 else MEMO), desk.facts(*NOTICE_FACTS)


# --- minutes ---------------------------------------------------------------------------------------------------------
MINUTES = """[議事録|{meeting} 議事録|会議議事録]
会議名: {meeting}
日時: {date} {begin}:00〜{end}:00
場所: {room}
出席者: {attendees}
議長: {chair} 記録: {clerk_of_day}

{agenda}

[決定事項の担当と期限|【今後の対応】|■ 担当と期限]
{actions}

次回: {next_date} {begin}:00から{room}にて[開催する|行う]。
以上"""
# Title, report, decision, task. {a} speaks, {b} takes the task over.
TOPICS = (
    (
        "{product}の導入",
        "{a}より、{product}の見積結果について[報告|説明]があった。{quantity:,}{unit}で総額{total:,}円(税込)となる。[予算の範囲内であることを確認した。|]",
        "{product}を{quantity:,}{unit}[購入する|発注する]。",
        "{product}の[発注手続き|社内稟議]",
    ),
    (
        "{month}度の売上報告",
        "{a}より、{month}の売上について報告があった。目標{target:,}万円に対し、実績は{actual:,}万円、達成率は{rate}%であった。",
        "[未達の要因を|取引先別の実績を|製品別の実績を][整理し|分析し]、次回の会議で報告する。",
        "{month}度売上の[分析資料|報告資料]の作成",
    ),
    (
        "お客様からのご意見への対応",
        "{a}より、{month}に寄せられたご意見は{cases}件で、うち{product}に関するものが{part}件あったとの報告があった。",
        "{product}に関する{part}件について、[原因を調査する|回答の内容を見直す|再発防止策をまとめる]。",
        "{product}に関する[原因の調査|再発防止策の作成]",
    ),
    (
        "在庫の削減",
        "{a}より、{product}の在庫が{stock:,}{unit}あり、適正在庫を{over:,}{unit}上回っているとの[説明|報告]があった。",
        "{product}の在庫を{over:,}{unit}削減する。",
        "{product}の[発注計画の見直し|在庫削減計画の作成]",
    ),
    (
        "展示会への出展",
        "{a}より、{event_place}で開催される展示会への出展案が示された。費用は{budget:,}万円を見込む。[出品の候補は{product}である。|]",
        "費用の上限を{budget:,}万円として出展する。",
        "出展の[申し込み|準備計画の作成]",
    ),
    (
        "{project}",
        "{a}より、{project}の進捗について[報告|説明]があった。[予定より{late}日遅れている|おおむね計画どおりに進んでいる|関係部署との調整が残っている]とのことであった。",
        "{project}について、[毎週進捗を共有する|担当者を増やす|日程を見直す]。",
        "{project}に関する[日程表の更新|関係部署との調整]",
    ),
    (
        "安全衛生活動",
        "{a}より、{month}のヒヤリハット報告は{cases}件であったとの報告があった。[転倒|挟み込み|落下物]に関するものが{part}件と最も多かった。",
        "[通路の表示を改める|作業手順書を見直す|職場の巡回を月{late}回行う]。",
        "[通路の点検|作業手順書の確認|巡回計画の作成]",
    ),
    (
        "経費の見直し",
        "{a}より、{month}の[消耗品費|通信費|出張費]は{spent:,}万円で、予算の{allowed:,}万円に対する執行率は{rate}%であるとの報告があった。",
        "[購入先を見直す|使用量を部署ごとに集計する|来月から事前申請を必須とする]。",
        "[経費の集計表|見直し案]の作成",
    ),
)


def minutes(desk: Desk) -> tuple[str, Facts]:
    """Minutes of a meeting, in the plain style: topics, decisions, who does what by when."""
    at = office.parties(desk)
    slots = desk.slots
    staff = office.people(desk, slots["vendor_domain"], slots["gap"], desk.between(3, 6))
    chair = staff[0].family + desk.pick(("部長", "課長", "次長"))
    attendees = [chair, *(one.family for one in staff[1:])]
    begin = desk.pick((9, 10, 13, 14, 15))
    month = f"{(DAYS[OFFICE[at]].month + 10) % 12 + 1}月"
    slots.update(
        meeting=desk.pick(lex.MEETINGS),
        chair=chair,
        clerk_of_day=staff[-1].family,
        attendees="、".join(attendees),
        begin=begin,
        end=begin + desk.between(1, 2),
        room=desk.pick(lex.ROOMS),
        next_date=day(OFFICE[at + desk.between(10, 22)], slots["full"]),
        month=month,
    )
    topics = list(range(len(TOPICS)))
    agenda, actions, decisions = [], [], []
    mark = desk.pick(("議題{}: ", "{}. ", "■ 議題{} "))
    for no in range(1, desk.pick((2, 2, 3)) + 1):
        title, report, decision, task = TOPICS[topics.pop(int(desk.random() * len(topics)))]
        slots.update(office.product(desk))
        speaker, doer = desk.pick(attendees[1:]), desk.pick(attendees[1:])
        cases, target, over = desk.between(4, 30), desk.between(3, 90) * 100, slots["quantity"]
        rate = desk.between(78, 99)
        slots.update(
            a=speaker,
            total=slots["price"] * slots["quantity"] * 11 // 10,
            target=target,
            rate=rate,
            actual=target * rate // 100,
            allowed=(allowed := desk.between(1, 9) * 100),
            spent=allowed * rate // 100,
            cases=cases,
            part=desk.between(cases // 2 + 1, cases - 1),
            over=over,
            stock=over * desk.between(2, 5),
            budget=desk.between(4, 60) * 5,
            late=desk.between(2, 6),
            project=desk.pick(lex.EVENTS),
            event_place=desk.pick(lex.PLACES)[1],
        )
        decisions.append(desk.say(decision))
        todo = {"task": desk.say(task), "person": doer, "deadline": day(OFFICE[at + desk.between(3, 9)], slots["soon"])}
        agenda.append(f"{mark.format(no)}{desk.say(title)}\n{desk.say(report)}\n決定事項: {decisions[-1]}")
        actions.append(todo)
    slots["agenda"] = "\n\n".join(agenda)
    line = desk.pick(
        (
            "・{task}: {person}({deadline}まで)",
            "・{person}: {task}({deadline}まで)",
            "・{deadline}まで: {task}(担当: {person})",
        )
    )
    slots["actions"] = "\n".join(line.format_map(todo) for todo in actions)
    text = desk.say(MINUTES)
    facts = desk.facts("date", "meeting", "room", "chair", "next_date")
    return text, facts | {"attendees": attendees, "decisions": decisions, "actions": actions}


# --- FAQ and daily reports -------------------------------------------------------------------------------------------
FAQ = """{product} よくある[ご質問|お問い合わせ]
[提供|発行]: {vendor} {vendor_department}
[最終更新日|更新日]: {date}

{answers}

[上記で解決しない場合は|その他のご質問は]、{vendor} {vendor_department}までお問い合わせください。
電話: {hotline}([平日|受付時間: 平日]{hours})
メール: {clerk_mail}"""
QUESTIONS = (
    (
        "保証期間は[いつまでですか|どのくらいですか]。",
        "{product}の保証期間は{warranty}です。[保証書は大切に保管してください。|期間内の自然故障は無償で対応いたします。|]",
    ),
    ("{op}の[方法|手順]を教えてください。", "[次の|以下の]手順で[行ってください|行えます]。\n{steps}"),
    (
        "「{symptom}」という[場合|とき]は、どうすればよいですか。",
        "{try_first}。それでも改善しない場合は、{hotline}までご連絡ください。[その際、製品名({product})をお知らせください。|]",
    ),
    (
        "[価格|1{unit}あたりの価格]を教えてください。",
        "{product}の標準価格は1{unit}あたり{price:,}円(税別)、{price_with_tax:,}円(税込)です。[数量により割引がございます。|]",
    ),
    (
        "[電話|お電話]での[問い合わせ|相談]は何時まで可能ですか。",
        "[平日|土日祝日を除く平日]の{hours}、{hotline}で承っております。",
    ),
    (
        "{product}の[見積書|見積り]を依頼できますか。",
        "はい。必要な数量と納入先を{clerk_mail}までお知らせください。[{estimate}営業日以内に見積書をお送りします。|]",
    ),
    (
        "[注文|購入]してから何日で届きますか。",
        "[通常は|在庫がある場合]、ご注文から{lead}営業日以内にお届けします。[お急ぎの場合は{hotline}までご相談ください。|]",
    ),
    (
        "[返品|交換]はできますか。",
        "未使用の{product}に限り、お届けから{estimate}日以内であれば承ります。まず{hotline}までご連絡ください。",
    ),
)
FIRST_AID = {
    "d": "[まず|初めに]電源を[一度|いったん]切り、{minutes}分ほど待ってから入れ直してください",
    "s": "[まず|初めに]いったんログアウトし、最新版に更新されているかをご確認ください",
    "g": "[まず|初めに]取り付けや使用の状態を、付属の説明書の{page}ページでご確認ください",
}


def faq(desk: Desk) -> tuple[str, Facts]:
    """Questions about one product and their answers."""
    office.parties(desk)
    slots = desk.slots
    slots.update(office.product(desk))
    slots.update(
        price_with_tax=slots["price"] * 11 // 10,
        warranty=desk.pick(lex.WARRANTIES),
        lead=desk.between(2, 15),
        estimate=desk.between(2, 10),
        minutes=desk.between(1, 10),
        page=desk.between(4, 96),
        menu=desk.pick(lex.MENUS),
    )
    # Nothing is shipped of software (the last two questions), and paper or gloves have no warranty (the first).
    pool = list(QUESTIONS[slots["unit"] in "箱枚組足本" : -2 if slots["group"] == "s" else None])
    chosen = [pool.pop(int(desk.random() * len(pool))) for _ in range(desk.between(4, 5))]
    nested = {"{steps}": lex.STEPS[slots["group"]], "{try_first}": FIRST_AID[slots["group"]]}
    for slot, template in nested.items():
        chosen = [(q, a.replace(slot, template)) for q, a in chosen]
    mark = desk.pick(("Q{0}. {1}\nA{0}. {2}", "Q{0}: {1}\nA{0}: {2}", "【質問{0}】{1}\n【回答{0}】{2}"))
    slots["answers"] = "\n\n".join(mark.format(no, desk.say(q), desk.say(a)) for no, (q, a) in enumerate(chosen, 1))
    keys = "product date vendor vendor_department hotline hours clerk_mail symptom op price price_with_tax warranty".split()
    return desk.say(FAQ), desk.facts(*keys)


DIARY = """[業務日報|日報]
日付: {date}
[所属: {vendor} {vendor_department}\n氏名: {clerk}|氏名: {clerk}({vendor} {vendor_department})]

{mark}[本日の業務|業務内容]{mark_end}
{visits}

{mark}[本日の実績|実績]{mark_end}
訪問件数: {count}件
受注: {order_line}

{mark}所感{mark_end}
{remark}

{mark}[今後の予定|次の予定]{mark_end}
{plan}"""
ORDERED = (
    "{product}の[価格の|納入条件の|]最終確認を行い、[正式に|]{quantity:,}{unit}の[注文をいただいた|発注を受けた]。"
)
VISITS = (
    "{product}の[見積書を提出した|提案を行った]。{quantity:,}{unit}の[導入|購入]を検討中とのこと。",
    "{product}の[使用状況を確認した|使用状況の聞き取りを行った]。[特に問題はない|「{symptom}」ことがある]とのこと。",
    "{product}の[納期|価格|保守内容]について[相談を受けた|問い合わせがあった]。{promise}までに回答することとした。",
    "{product}の[操作説明|取り扱い説明]を行った。{op}について質問があり、その場で[回答した|説明した]。",
)
REMARKS = (
    "{company}は{product}の導入に前向きであり、[早めに条件を提示したい|次回は価格の相談になる見込みである]。",
    "[他社との比較|価格の引き下げ]を求められることが増えている。{product}の[特長|導入効果]を分かりやすく説明する資料が必要である。",
    "{company}から[納期|保守体制]に関する質問が多く、[社内で回答をそろえておきたい|関係部署と早めに共有しておきたい]。",
)
PLANS = (
    "{promise} {company}の{department} {family}様へ[見積書を送付|電話で状況を確認|資料を持参]する。",
    "[社内会議に出席した後、|午前中に資料をまとめ、|]{promise}までに{company}へ{product}の[資料|見積書]を送る。",
)


def diary(desk: Desk) -> tuple[str, Facts]:
    """A salesperson's daily report: visits, an order perhaps, remarks and plans."""
    at = office.parties(desk)
    slots = desk.slots
    visits, rows, order_line = [], [], "なし"
    hours = desk.pick(((9, 11, 14), (10, 13, 15), (9, 13, 16), (10, 14, 16)))
    count = desk.between(2, 3)
    for no in range(count):
        customer = office.company(desk)
        host = office.person(desk, customer.domain, slots["gap"])
        slots.update(office.product(desk))
        slots.update(
            company=customer.name,
            department=desk.pick(lex.DEPARTMENTS),
            family=host.family,
            promise=day(OFFICE[at + desk.between(1, 5)], slots["soon"]),
        )
        hour, half = hours[no], desk.pick(("00", "30"))
        ordered = no == 0 and desk.chance(0.6)
        rows.append(
            f"{hour}:{half}〜{hour + 1}:{half} "
            + desk.say("{company}[ 訪問|を訪問]({department} {family}様)\n")
            + desk.any((ORDERED,) if ordered else VISITS)
        )
        visits.append({"company": customer.name, "person": host.family, "product": slots["product"]})
        if ordered:
            slots["total"] = slots["price"] * slots["quantity"] * 11 // 10
            order_line = desk.say("{company}より{product} {quantity:,}{unit}([税込|計]{total:,}円)")
    slots.update(visits="\n\n".join(rows), count=count, order_line=order_line)
    slots["remark"] = desk.any(REMARKS)
    slots["plan"] = desk.any(PLANS)
    text = desk.say(DIARY)
    return text, desk.facts("date", "vendor", "vendor_department", "clerk", "total", "count") | {"visits": visits}
