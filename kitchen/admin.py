"""Offers the admin: the menu to edit, the orders to look up and put right."""

from django.contrib import admin
from django.db.models import Count, Q

from kitchen.models import Dish, Order, OrderLine, Section

admin.site.site_header = "Quince"
admin.site.site_title = "Quince"
admin.site.index_title = "Back office"


@admin.register(Section)
class SectionAdmin(admin.ModelAdmin):
    list_display = ["name", "position", "dishes_on_offer"]
    list_editable = ["position"]
    search_fields = ["name"]

    def get_queryset(self, request):
        on_offer = Count("dishes", filter=Q(dishes__available=True))
        return super().get_queryset(request).annotate(on_offer=on_offer)

    @admin.display(description="dishes on offer", ordering="on_offer")
    def dishes_on_offer(self, section):
        return section.on_offer


@admin.register(Dish)
class DishAdmin(admin.ModelAdmin):
    list_display = ["name", "section", "price", "vegetarian", "available", "position"]
    list_editable = ["price", "available", "position"]
    list_filter = ["available", "vegetarian", "section"]
    list_select_related = ["section"]
    search_fields = ["name", "description"]


class OrderLineInline(admin.TabularInline):
    model = OrderLine
    autocomplete_fields = ["dish"]
    extra = 0


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    list_display = ["id", "table", "status", "portions", "amount", "promise", "created_at"]
    list_display_links = ["id", "table"]
    list_filter = ["status", "created_at"]
    search_fields = ["table", "note", "lines__dish__name"]
    date_hierarchy = "created_at"
    readonly_fields = ["promised_minutes", "created_at", "changed_at"]
    inlines = [OrderLineInline]
    actions = ["mark_served"]

    def get_queryset(self, request):
        return super().get_queryset(request).with_totals()

    @admin.display(ordering="portions")
    def portions(self, order):
        return order.portions

    @admin.display(ordering="amount")
    def amount(self, order):
        return f"€ {order.amount:.2f}"

    @admin.display(description="promise", ordering="promised_minutes", empty_value="none")
    def promise(self, order):
        return order.promised_minutes and f"{order.promised_minutes} min"

    @admin.action(description="Mark the selected orders as served")
    def mark_served(self, request, queryset):
        for order in queryset.open():
            order.status = Order.Status.SERVED
            order.save(update_fields=["status", "changed_at"])  # one save each: it tells the board
